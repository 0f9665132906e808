"""Sealed scores against a suspect's answers, in whatever form they come.

The form is recognised as :mod:`gradmark.scores` does it: labels alone (one-hot rows), probabilities, of all
classes or of the largest, or logits; each may be rounded to decimals, or cut off. An answer agrees with the
seal if it would be shown so by a model whose logits are within half the seal's tolerance.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from gradmark.scores import decimals_of, probabilities

Form = Literal["logits", "probabilities", "labels"]
_SUM = 1e-3


@dataclass(frozen=True)
class Comparison:
    """``off`` (n,): probes whose answer isn't the sealed model's. ``moved``: root mean square by which the
    logarithms of scores moved (None for labels). ``form``, ``decimals``: what the answers are. ``blank``:
    probes whose answer hides every class, and so tells nothing."""

    form: Form
    decimals: int | None
    off: Tensor
    moved: float | None
    blank: int = 0


def logarithms(scores: Tensor, form: Form) -> Tensor:
    """Scores (n, C) as centred logits, float64: each row has mean zero."""
    z = scores.double().clamp_min(1e-30).log() if form == "probabilities" else scores.double()
    return z - z.mean(1, keepdim=True)


def compared(sealed: Tensor, form: Form, answers: Tensor, tolerance: float) -> Comparison:
    """``sealed`` (n, C) float64 of ``form`` against ``answers`` (n, C); ``tolerance`` in logits."""
    got = answers.double()
    if bool(((got == 0) | (got == 1)).all()) and bool((got.sum(1) == 1).all()):
        off = got.argmax(1) != sealed.argmax(1)
        return Comparison("labels", None, off, None)
    decimals = decimals_of(got)
    unit = 0.0 if decimals is None else 10.0**-decimals
    if probabilities(answers) is None:
        z = sealed.clamp_min(1e-30).log() if form == "probabilities" else sealed
        slack = tolerance + 4e-7 * got.abs()
        off = _off(got - z, unit, slack)
        if bool(off.any()):  # an interface may give logarithms of probabilities: logits but for a constant
            off &= _off(got.log_softmax(1) - z.log_softmax(1), 2 * unit, 2 * slack)
        return Comparison("logits", decimals, off, _moved(z, got))
    p = sealed if form == "probabilities" else sealed.softmax(1)
    hidden = (got == 0) & (got.sum(1, keepdim=True) < 1 - max(_SUM, unit * got.shape[1]))
    off = _off((got - p).masked_fill(hidden, 0.0), unit, tolerance * p + 2e-7)
    least = got.masked_fill(hidden, torch.inf).amin(1, keepdim=True)
    off |= (hidden & (p * (1 - 2 * tolerance) > least + unit)).any(1)  # a larger one would have been shown
    floor = max(unit / 2, 1e-12)
    moved = _moved(p.clamp_min(floor).log().masked_fill(hidden, 0.0),
                   got.clamp_min(floor).log().masked_fill(hidden, 0.0))  # fmt: skip
    return Comparison("probabilities", decimals, off, moved, int(hidden.all(1).sum()))


def _off(difference: Tensor, unit: float, slack: Tensor) -> Tensor:
    """Rows (n,) with a difference that rounding to ``unit`` and noise of ``slack`` don't explain.

    Where all answers fit cutting off instead of rounding, that is the explanation.
    """
    rounded = difference.abs() > unit / 2 + slack
    cut = (difference > slack) | (difference < -unit - slack)
    return (rounded if bool(cut.any()) else cut).any(1)


def _moved(before: Tensor, after: Tensor) -> float:
    change = after - before
    return float((change - change.mean(1, keepdim=True)).square().mean().sqrt())


__all__ = ["Comparison", "Form", "compared", "logarithms"]
