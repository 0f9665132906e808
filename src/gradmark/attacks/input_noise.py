"""An API that adds noise to every input (Cohen et al. 2019, without the vote)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gradmark.guards import Guard, normal
from gradmark.protocols import Thief


@dataclass(frozen=True)
class InputNoise:
    """White noise of standard deviation ``sigma`` natural units (``spec.scale``)."""

    sigma: float = 4 / 255

    name = "input-noise"

    def run(self, model: nn.Module, thief: Thief, generator: torch.Generator) -> nn.Module:
        size = self.sigma * thief.spec.scale

        def before(x: Tensor, noise: torch.Generator) -> Tensor:
            return x + size * normal(x, noise)

        return Guard(model, generator, before=before)
