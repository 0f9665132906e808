"""An API that blurs every image, or takes a moving average of every signal."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradmark.errors import AttackError
from gradmark.guards import Guard, axes, planes
from gradmark.protocols import Thief


@dataclass(frozen=True)
class InputSmooth:
    """``size`` (odd) samples along each axis, of equal weight (``mean``) or falling off (``gaussian``).

    The border is repeated outwards. Raises AttackError on vectors, whose features have no neighbours,
    and on an even size.
    """

    size: int = 3
    kind: Literal["gaussian", "mean"] = "gaussian"

    name = "input-smooth"

    def run(self, model: nn.Module, thief: Thief, generator: torch.Generator) -> nn.Module:
        n = axes(thief, self.name, "image", "signal")
        if self.size < 1 or self.size % 2 == 0:
            raise AttackError("A blur needs a middle", expected="an odd size", found=str(self.size))
        kernel = self._kernel(n)

        def before(x: Tensor, noise: torch.Generator) -> Tensor:
            flat = planes(x, n)
            channels = flat.shape[1]
            padded = F.pad(flat, [self.size // 2] * (2 * n), mode="replicate")
            weight = kernel.to(x).expand(channels, 1, *kernel.shape)
            convolve = F.conv2d if n == 2 else F.conv1d
            return convolve(padded, weight, groups=channels).reshape(x.shape)

        return Guard(model, generator, before=before)

    def _kernel(self, n: int) -> Tensor:
        """(size,) or (size, size), summing to 1; the width follows from the size as in OpenCV."""
        width = 0.3 * ((self.size - 1) / 2 - 1) + 0.8
        away = torch.arange(self.size) - self.size // 2
        line = torch.exp(-0.5 * (away / width) ** 2) if self.kind == "gaussian" else torch.ones(self.size)
        line = line / line.sum()
        return torch.outer(line, line) if n == 2 else line
