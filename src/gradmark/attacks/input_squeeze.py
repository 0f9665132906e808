"""An API that squeezes features: few levels, then a median (Xu, Evans & Qi 2018)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradmark.guards import Guard, axes, bounds, depth, planes
from gradmark.protocols import Thief


@dataclass(frozen=True)
class InputSqueeze:
    """``2**bits`` levels, then the lower median of ``size`` samples along each axis.

    The border is repeated outwards. The gradient passes the levels as if nothing had happened, and goes
    to the sample that is the median. Raises AttackError on vectors.
    """

    bits: int = 5
    size: int = 2

    name = "input-squeeze"

    def run(self, model: nn.Module, thief: Thief, generator: torch.Generator) -> nn.Module:
        n = axes(thief, self.name, "image", "signal")
        low, high = bounds(thief)
        margin = [(self.size - 1) // 2, self.size // 2] * n

        def before(x: Tensor, noise: torch.Generator) -> Tensor:
            windows = F.pad(planes(depth(x, self.bits, low, high), n), margin, mode="replicate")
            for axis in range(2, 2 + n):
                windows = windows.unfold(axis, self.size, 1)
            return windows.flatten(2 + n).median(-1).values.reshape(x.shape)

        return Guard(model, generator, before=before)
