"""An API that adds noise to its probabilities."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gradmark.guards import Guard, normal, softmax, straight_through
from gradmark.protocols import Thief


@dataclass(frozen=True)
class OutputNoise:
    """White noise of standard deviation ``level`` on each probability; then none is negative, sum 1."""

    level: float = 0.01

    name = "output-noise"

    def run(self, model: nn.Module, thief: Thief, generator: torch.Generator) -> nn.Module:
        def after(scores: Tensor, noise: torch.Generator) -> Tensor:
            p = softmax(scores)
            moved = (p.detach() + self.level * normal(p, noise)).clamp_min(0.0)
            return straight_through(moved / moved.sum(1, keepdim=True).clamp_min(1e-6), p)

        return Guard(model, generator, after=after)
