"""Several attacks, one after the other."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from gradmark.protocols import Attack, Thief


@dataclass(frozen=True)
class Chain:
    """Run each of ``steps`` on what the one before it made; ``name`` joins theirs with ``+``."""

    steps: tuple[Attack, ...]

    @property
    def name(self) -> str:
        return "+".join(step.name for step in self.steps)

    def run(self, model: nn.Module, thief: Thief, generator: torch.Generator) -> nn.Module:
        attacked = model
        for step in self.steps:
            attacked = step.run(attacked, thief, generator)
        return attacked
