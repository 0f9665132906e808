"""An API that keeps few levels of every input (Xu, Evans & Qi 2018, feature squeezing)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gradmark.guards import Guard, bounds, depth
from gradmark.protocols import Thief


@dataclass(frozen=True)
class InputDepth:
    """The nearest of ``2**bits`` levels; the gradient passes as if nothing had happened.

    Inputs without bounds get those of the thief's own inputs.
    """

    bits: int = 5

    name = "input-depth"

    def run(self, model: nn.Module, thief: Thief, generator: torch.Generator) -> nn.Module:
        low, high = bounds(thief)

        def before(x: Tensor, noise: torch.Generator) -> Tensor:
            return depth(x, self.bits, low, high)

        return Guard(model, generator, before=before)
