"""Class scores as schemes use them: one fixed, public rule for logits, probabilities and rounding."""

from __future__ import annotations

from torch import Tensor

from gradmark.errors import MismatchError


def probabilities(scores: Tensor) -> Tensor | None:
    """The scores, floored away from zero, if they are probabilities; None if they are logits.

    Probabilities are scores in [0, 1] whose rows all sum to 1 within 1e-3: a fixed, public rule.
    """
    rows = scores.double().sum(1)
    if bool(((scores < 0) | (scores > 1)).any()) or bool(((rows - 1).abs() > 1e-3).any()):
        return None
    return scores.clamp_min(1e-12)


def log_scores(scores: Tensor, n_classes: int) -> Tensor:
    """Logits up to a constant per row (b, C), float64, from logits or probabilities.

    Rounded probabilities are floored at half of one unit of the coarsest decimal that explains
    all of them (at most 6 decimals), so that a class rounded to zero reads as a tie and not as
    an infinite difference. Raises MismatchError on a wrong number of classes.
    """
    if scores.shape[1] != n_classes:
        raise MismatchError(
            "The suspect doesn't fit the mark", expected=f"{n_classes} classes", found=f"{scores.shape[1]}"
        )
    if probabilities(scores) is None:
        return scores.double()
    p = scores.double()
    for decimals in range(1, 7):
        if bool(((p - p.round(decimals=decimals)).abs() < 1e-8).all()):
            return p.clamp_min(0.5 * 10.0**-decimals).log()
    return p.clamp_min(1e-12).log()
