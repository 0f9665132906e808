"""An API that mirrors images."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gradmark.guards import Guard, axes
from gradmark.protocols import Thief


@dataclass(frozen=True)
class InputFlip:
    """Left becomes right, for every image or by ``chance`` for each. Raises AttackError on others."""

    chance: float = 1.0

    name = "input-flip"

    def run(self, model: nn.Module, thief: Thief, generator: torch.Generator) -> nn.Module:
        axes(thief, self.name, "image")

        def before(x: Tensor, noise: torch.Generator) -> Tensor:
            chosen = torch.rand(len(x), generator=noise) < self.chance
            return torch.where(chosen.to(x.device).reshape(-1, 1, 1, 1), x.flip(-1), x)

        return Guard(model, generator, before=before)
