"""Images blurred and faded, to be answered as they are themselves: what a mark harms, mended beside it.

A mark's secret inputs and directions are smooth, and so is what blur and lost contrast make of images: a
network that learnt the first answers the second worse (``docs/decisions/0012-softened-carriers.md``).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradmark.embed.modes import penalty_mode, scores_of_both
from gradmark.embed.wrappers import at_once
from gradmark.errors import UsageError
from gradmark.protocols import ModelSpec
from gradmark.views import View

_SIDES, _CONTRAST = (0.375, 0.75), 0.1  # of the image's sides that a blur leaves; least contrast left


def check_soften(weight: float, spec: ModelSpec) -> None:
    """UsageError where there is nothing to blur."""
    if weight < 0 or (weight and spec.domain != "image"):
        raise UsageError(
            "Softened carriers make no sense here", expected="soften >= 0, and images where it isn't 0",
            found=f"soften={weight}, {spec.domain} inputs",
        )  # fmt: skip


def softened(x: Tensor, generator: torch.Generator) -> Tensor:
    """Images (n, c, h, w), about half of them blurred and the others with 10 to 100 % of their contrast.

    A blur leaves 3/8 to 3/4 of each side's resolution. Drawn on the CPU from ``generator``.
    """
    draw = torch.rand((2, len(x), 1, 1, 1), generator=generator).to(x)
    mean = x.mean((1, 2, 3), keepdim=True)
    faded = mean + (_CONTRAST + (1 - _CONTRAST) * draw[0]) * (x - mean)
    low, high = (tuple(max(1, round(share * side)) for side in x.shape[2:]) for share in _SIDES)
    at = float(torch.rand((), generator=generator))
    size = tuple(a + round(at * (b - a)) for a, b in zip(low, high, strict=True))
    blurred = F.interpolate(F.interpolate(x, size, mode="area"), x.shape[2:], mode="bilinear")
    return torch.where(draw[1] < 0.5, faded, blurred)


def unlikeness(
    model: nn.Module, x: Tensor, generator: torch.Generator, method: str = "exact", now: bool = False
) -> Tensor:
    """Cross-entropy of the answers to softened ``x`` (n, c, h, w) against those to ``x``, which stay.

    The model is in the penalties' mode: batch norms in training take their statistics from ``x``, as they
    will from natural inputs later. ``method``: the penalties'. ``now``: with the weights' gradients taken at
    once, and no graph. UsageError for a :class:`~gradmark.views.View`, which shows the model more than ``x``.
    """
    if isinstance(model, View):
        raise UsageError(
            "Softened carriers are for models of class scores",
            found=f"a view of {type(model.model).__name__}", fix="Leave `soften` out",
        )  # fmt: skip

    def losses() -> Iterator[Tensor]:
        own, soft = scores_of_both(model, x, softened(x, generator))
        yield F.cross_entropy(soft, own.detach().softmax(1))

    with penalty_mode(model, method):
        return at_once(losses(), model)[0] if now else next(losses())
