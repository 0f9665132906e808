"""Class scores as schemes use them: one fixed, public rule for logits, probabilities and rounding."""

from __future__ import annotations

from torch import Tensor

from gradmark.errors import MismatchError

_DECIMALS = range(1, 7)
_FLOAT32 = 1e-7  # more than the rounding of a float32 below 1, less than any decimal's


def probabilities(scores: Tensor) -> Tensor | None:
    """The scores, floored away from zero, if they are probabilities; None if they are logits.

    Probabilities are scores in [0, 1] whose rows all sum to 1, within 1e-3 or what rounding them to
    decimals can take away: a fixed, public rule.
    """
    if bool(((scores < 0) | (scores > 1)).any()):
        return None
    decimals = _decimals(scores)
    rounding = 0.0 if decimals is None else 0.5 * 10.0**-decimals * scores.shape[1]
    if bool(((scores.double().sum(1) - 1).abs() > max(1e-3, rounding)).any()):
        return None
    return scores.clamp_min(1e-12)


def check_classes(scores: Tensor, n_classes: int) -> None:
    """Raises MismatchError unless the scores (b, C) are of ``n_classes`` classes."""
    if scores.shape[1] != n_classes:
        raise MismatchError(
            "The suspect doesn't fit the mark", expected=f"{n_classes} classes", found=f"{scores.shape[1]}"
        )


def log_scores(scores: Tensor, n_classes: int) -> Tensor:
    """Logits up to a constant per row (b, C), float64, from logits or probabilities.

    Rounded probabilities are floored at half of one unit of the coarsest decimal that explains
    all of them (at most 6 decimals), so that a class rounded to zero reads as a tie and not as
    an infinite difference. Raises MismatchError on a wrong number of classes.
    """
    check_classes(scores, n_classes)
    if probabilities(scores) is None:
        return scores.double()
    decimals = _decimals(scores)
    return scores.double().clamp_min(1e-12 if decimals is None else 0.5 * 10.0**-decimals).log()


def _decimals(scores: Tensor) -> int | None:
    """The fewest decimals, at most 6, that all scores are rounded to; None if they aren't."""
    p = scores.double()
    for decimals in _DECIMALS:
        if bool(((p - p.round(decimals=decimals)).abs() < _FLOAT32).all()):
            return decimals
    return None
