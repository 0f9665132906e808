"""Is the penalty's gradient right on this very model? Asked before training starts.

Fused attention, cuDNN RNNs and some custom autograd Functions have no double backward, or a
silently wrong one. The check compares the gradient of the mean reading with respect to the weights
against a finite difference along random weight directions. Readings of ReLU nets jump where a unit
switches (their second derivative lives on the kinks, which autograd rightly leaves out at a
point), so the check runs on a float64 copy with a step so small that no unit switches.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gradmark.embed.modes import penalty_mode
from gradmark.errors import PreflightError
from gradmark.protocols import Batch, Choosy, Mark, Scheme
from gradmark.suspects.checks import brief

METHODS = ("central-difference", "exact")
"""In order of preference: the central difference costs less, needs no second order, and trains
the very finite step that a black-box reading takes."""

_TOLERANCE = 1e-3
_STEP = 1e-8  # relative to the norm of the weights
_DIRECTIONS = 3


@dataclass(frozen=True)
class Check:
    """How one method fared: ``error`` is relative to the larger of the two derivatives."""

    method: str
    ok: bool
    error: float
    reason: str = ""


def check_method(scheme: Scheme, mark: Mark, model: nn.Module, batch: Batch, method: str) -> Check:
    """Compare one method's gradient with a finite difference; ``batch`` of a few inputs suffices."""
    try:
        twin = copy.deepcopy(model).double()
    except Exception as cause:  # a wrapper that can't be copied: whatever it raises, we can't check it
        return Check(
            method, False, float("nan"), f"the model can't be copied ({type(cause).__name__}: {cause})"
        )
    x, labels = batch[0].double() if batch[0].is_floating_point() else batch[0], batch[1]
    weights = [p for p in twin.parameters() if p.requires_grad]
    if not weights:
        return Check(method, False, float("nan"), "no weight of the model requires a gradient")

    def reading() -> Tensor:
        generator = torch.Generator().manual_seed(0)
        return scheme.probe(mark, twin, (x, labels), generator, method)[0].sum()

    device = next(iter(weights)).device.type
    with torch.random.fork_rng(devices=[]), penalty_mode(twin), torch.autocast(device, enabled=False):
        try:
            gradient: tuple[Tensor | None, ...] = torch.autograd.grad(reading(), weights, allow_unused=True)
        except Exception as cause:  # a stranger's forward or backward may raise anything
            return Check(method, False, float("nan"), brief(cause))
        known = [torch.zeros_like(w) if g is None else g for w, g in zip(weights, gradient, strict=True)]
        size = float(torch.stack([g.norm() for g in known]).norm())
        if size == 0 or not torch.isfinite(torch.tensor(size)):
            return Check(method, False, float("nan"), "the gradient is zero or not finite")
        worst = max(_compare(reading, weights, known, seed) for seed in range(_DIRECTIONS))
    ok = worst <= _TOLERANCE
    return Check(method, ok, worst, "" if ok else "the gradient disagrees with a finite difference")


def _compare(
    reading: Callable[[], Tensor], weights: list[nn.Parameter], gradient: list[Tensor], seed: int
) -> float:
    """Relative error along one random direction scaled like the weights, tensor by tensor."""
    generator = torch.Generator().manual_seed(seed)
    step = [
        torch.randn(w.shape, generator=generator, dtype=torch.float64).to(w.device)
        * (w.detach().norm().clamp_min(1e-3) / w.numel() ** 0.5)
        for w in weights
    ]
    values = []
    with torch.no_grad():
        for sign in (1.0, -2.0, 1.0):  # there, beyond to the other side, and home again
            for w, s in zip(weights, step, strict=True):
                w.add_(s, alpha=sign * _STEP)
            with torch.enable_grad():
                values.append(float(reading().detach()))
    found = (values[0] - values[1]) / (2 * _STEP)
    claimed = float(sum((g * s).sum() for g, s in zip(gradient, step, strict=True)))
    scale = max(
        abs(found),
        abs(claimed),
        1e-2 * float(sum((g.norm() * s.norm()) for g, s in zip(gradient, step, strict=True))),
    )
    return abs(found - claimed) / scale if scale else 0.0


def choose_method(scheme: Scheme, mark: Mark, model: nn.Module, batch: Batch, wanted: str = "auto") -> Check:
    """The first method that is right here. Raises PreflightError, with every reason, if none is."""
    first = torch.arange(len(batch[1]), device=batch[1].device)
    if isinstance(scheme, Choosy):  # inputs that carry the penalty must be among the few
        first = scheme.carrying(mark, batch[1]).int().argsort(descending=True, stable=True)
    few = batch[0][first[:4]], batch[1][first[:4]]
    checks = []
    for method in METHODS if wanted == "auto" else (wanted,):
        checks.append(check_method(scheme, mark, model, few, method))
        if checks[-1].ok:
            return checks[-1]
    raise PreflightError(
        "No method gives a right penalty gradient on this model",
        expected=f"a relative error of at most {_TOLERANCE} against a finite difference",
        found="; ".join(f"{c.method}: {c.reason} (error {c.error:.2g})" for c in checks),
        fix="try method='auto', eager attention, non-reentrant checkpointing, or the model unwrapped",
    )
