"""An API that shifts every input a little, as a crop of an enlarged one would."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradmark.guards import Guard, axes, planes
from gradmark.protocols import Thief


@dataclass(frozen=True)
class InputCrop:
    """A shift by ``shift`` pixels or samples along each axis; ``random``: by up to as many, either way.

    The border is repeated outwards. Raises AttackError on vectors.
    """

    shift: int = 2
    random: bool = True

    name = "input-crop"

    def run(self, model: nn.Module, thief: Thief, generator: torch.Generator) -> nn.Module:
        n = axes(thief, self.name, "image", "signal")
        size, span = thief.spec.input_shape[-n:], 2 * self.shift + 1

        def before(x: Tensor, noise: torch.Generator) -> Tensor:
            padded = F.pad(planes(x, n), [self.shift] * (2 * n), mode="replicate")
            starts = torch.zeros(len(x), n, dtype=torch.int64)
            if self.random:
                starts = torch.randint(span, (len(x), n), generator=noise)
            parts = []
            for row, start in zip(padded, starts.tolist(), strict=True):
                window = [slice(s, s + length) for s, length in zip(start, size, strict=True)]
                parts.append(row[(slice(None), *window)])
            return torch.stack(parts).reshape(x.shape)

        return Guard(model, generator, before=before)
