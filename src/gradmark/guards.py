"""A thief's API: the stolen model behind something that changes what goes in or what comes out."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from gradmark.errors import AttackError
from gradmark.protocols import Domain, Thief
from gradmark.scores import probabilities
from gradmark.suspects.checks import unwrap

Change = Callable[[Tensor, torch.Generator], Tensor]
"""From inputs (b, *shape), or scores (b, C), and a source of noise to the same shape."""


class Guard(nn.Module):
    """A copy of ``model``, in eval mode, behind ``before`` (on inputs) and ``after`` (on scores).

    Both treat every row for itself, so it doesn't matter how questions are batched; noise comes from a
    generator of the guard's own, seeded here, and depends on what was asked before. Whatever isn't
    differentiable lets gradients straight through: who holds the weights can still read them.
    """

    def __init__(
        self,
        model: nn.Module,
        generator: torch.Generator,
        *,
        before: Change | None = None,
        after: Change | None = None,
    ) -> None:
        super().__init__()
        self.model = copy.deepcopy(model)
        self.before, self.after = before, after
        seed = int(torch.randint(2**62, (), generator=generator))
        self.noise = torch.Generator().manual_seed(seed)
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        if self.before is not None:
            x = self.before(x, self.noise)
        scores: Tensor = unwrap(self.model(x))
        return scores if self.after is None else self.after(scores, self.noise)


def log_softmax(scores: Tensor) -> Tensor:
    """Log-probabilities (b, C), at least float32, also of scores that are probabilities already."""
    scores = scores.float() if scores.dtype in (torch.float16, torch.bfloat16) else scores
    found = probabilities(scores)
    return scores.log_softmax(1) if found is None else found.log()


def softmax(scores: Tensor) -> Tensor:
    """Probabilities (b, C), at least float32: the scores themselves where they are that already."""
    scores = scores.float() if scores.dtype in (torch.float16, torch.bfloat16) else scores
    logits = probabilities(scores.detach()) is None or not bool(scores.any())
    return scores.softmax(1) if logits else scores


def normal(like: Tensor, noise: torch.Generator) -> Tensor:
    """Standard normal numbers in the shape, type and place of ``like`` (b, ...)."""
    # row by row: torch draws few numbers in another way than many, and batching is not to matter
    return torch.stack([torch.randn(like.shape[1:], generator=noise) for _ in like]).to(like)


def straight_through(changed: Tensor, x: Tensor) -> Tensor:
    """The values of ``changed`` with the gradient of ``x``."""
    # the difference first, so that no rounding is left where there is no gradient to pass
    return changed if not x.requires_grad else changed.detach() + (x - x.detach())


def axes(thief: Thief, attack: str, *allowed: Domain) -> int:
    """Axes along which neighbours are alike: 2 for images, 1 for signals.

    Raises AttackError where the domain isn't among those ``allowed``.
    """
    if thief.spec.domain not in allowed:
        raise AttackError(
            f"The attack {attack} makes no sense here",
            expected=" or ".join(f"{name}s" for name in allowed),
            found=f"{thief.spec.domain}s",
        )
    return 2 if thief.spec.domain == "image" else 1


def planes(x: Tensor, n_axes: int) -> Tensor:
    """``x`` (b, *shape) as (b, channels, *space): a mono signal has no axis for channels."""
    return x.reshape(len(x), -1, *x.shape[x.ndim - n_axes :])


def bounds(thief: Thief) -> tuple[float, float]:
    """The smallest and the largest legal input, or those of the thief's own where there is no law."""
    low, high = thief.spec.low, thief.spec.high
    if low is None or high is None:
        return float(thief.x.min()), float(thief.x.max())
    return low, high


def depth(x: Tensor, bits: int, low: float, high: float) -> Tensor:
    """The nearest of ``2**bits`` levels from ``low`` to ``high``, with a gradient as if unchanged."""
    steps = 2**bits - 1
    unit = max(high - low, 1e-12) / steps
    return straight_through(((x.clamp(low, high) - low) / unit).round() * unit + low, x)
