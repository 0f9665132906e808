"""Class scores as schemes use them: one fixed, public rule for logits, probabilities and rounding.

Scores are *probabilities* if all of them are in [0, 1], no row sums to more than 1, and a row that sums
to less holds an exact zero (a class that wasn't shown); sums may be off by 1e-3 or by what rounding to
decimals explains. Everything else is *logits*: also probabilities with noise that nobody evened out.

Probabilities are read as logarithms, and small ones are first raised to a *floor*, so that a class that
isn't shown reads as a tie and not as an infinite difference. The floor is

- half a unit of the coarsest decimal (at most 6) that explains all scores: rounded answers; one-hot
  answers have one decimal;
- else, in a row with exact zeros (only the largest classes shown, noise cut off at zero), a tenth of that
  row's smallest probability above zero, which a class that isn't shown doesn't reach;
- never less than 1e-30.

All answers are judged together, so pass all of them: the rule must not depend on a chunk.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gradmark.errors import MismatchError
from gradmark.protocols import Batch, ModelSpec

_DECIMALS = range(1, 7)
_FLOAT32 = 2e-7  # relative: more than float32 rounds off, so that tiny logits are no rounded zeros
_SUM = 1e-3  # by which sums may miss 1 whatever the cause
_HIDDEN = 0.1
_ROOM = 0.05  # of a range, by which inputs may lie outside of it
_LEAST = 1e-30  # float32 and its reciprocal hold it


def probabilities(scores: Tensor) -> Tensor | None:
    """The scores (b, C), raised to the floor, if they are probabilities; None if they are logits."""
    found = _floor(scores)
    return None if found is None else torch.maximum(scores, found.to(scores))


def wide(scores: Tensor) -> Tensor:
    """Half precision as float32; what is wider stays, since the preflight counts on float64."""
    return scores.float() if scores.dtype in (torch.float16, torch.bfloat16) else scores


def check_shape(spec: ModelSpec, x: Tensor) -> None:
    """Raises MismatchError unless the inputs (b, *shape) are of the mark's shape."""
    if x.shape[1:] != spec.input_shape:
        raise MismatchError(
            "The data doesn't fit the mark",
            expected=f"inputs of shape {spec.input_shape}",
            found=str(tuple(x.shape[1:])),
        )


def check_pool(spec: ModelSpec, pool: Batch) -> None:
    """Raises MismatchError unless inputs and labels are such as the mark was made for."""
    check_shape(spec, pool[0])
    if int(pool[1].max()) >= spec.n_classes or int(pool[1].min()) < 0:
        raise MismatchError(
            "The labels don't fit the mark",
            expected=f"classes 0 to {spec.n_classes - 1}",
            found=f"{int(pool[1].min())} to {int(pool[1].max())}",
        )


def check_range(spec: ModelSpec, x: Tensor, room: float = _ROOM) -> None:
    """Raises MismatchError where inputs (b, *shape) lie well outside of the range that the mark was made for.

    Pixels of 0 to 255, or normalised ones, where it was 0 to 1: inputs such as the model doesn't know.
    ``room``: how far they may lie outside, in parts of the range.
    """
    if spec.low is None or spec.high is None or not x.is_floating_point():
        return
    room, low, high = room * (spec.high - spec.low), float(x.min()), float(x.max())
    if low < spec.low - room or high > spec.high + room:
        raise MismatchError(
            "The data lie outside of the range that the mark is made for",
            expected=f"{spec.low:g} to {spec.high:g}",
            found=f"{low:g} to {high:g}",
            fix="Scale them so; a normalisation by mean and deviation belongs into the model",
        )


def check_classes(scores: Tensor, n_classes: int) -> None:
    """Raises MismatchError unless the scores (b, C) are of ``n_classes`` classes."""
    if scores.shape[1] != n_classes:
        raise MismatchError(
            "The suspect doesn't fit the mark", expected=f"{n_classes} classes", found=f"{scores.shape[1]}"
        )


def log_scores(scores: Tensor, n_classes: int) -> Tensor:
    """Logits up to a constant per row (b, C), float64, from logits or probabilities.

    Raises MismatchError on a wrong number of classes.
    """
    check_classes(scores, n_classes)
    found = _floor(scores)
    return scores.double() if found is None else torch.maximum(scores.double(), found).log()


def _floor(scores: Tensor) -> Tensor | None:
    """What smaller probabilities are raised to (b, 1), float64; None if the scores are logits."""
    if bool(((scores < 0) | (scores > 1)).any()):
        return None
    p = scores.double()
    decimals = decimals_of(p)
    # a whole unit per class: some cut decimals off where others round
    slack = _SUM if decimals is None else max(_SUM, 10.0**-decimals * p.shape[1])
    excess, hidden = p.sum(1, keepdim=True) - 1, (p == 0).any(1, keepdim=True)
    if bool((excess > slack).any()) or bool(((excess < -slack) & ~hidden).any()):
        return None
    if decimals is not None:
        return torch.full_like(excess, 0.5 * 10.0**-decimals)
    shown = p.masked_fill(p == 0, 1.0).amin(1, keepdim=True)
    return torch.where(hidden, _HIDDEN * shown, 0.0).clamp_min(_LEAST)


def decimals_of(p: Tensor) -> int | None:
    """The fewest decimals, at most 6, that all scores are rounded to; None if they aren't."""
    for decimals in _DECIMALS:
        if bool(((p - p.round(decimals=decimals)).abs() <= _FLOAT32 * p.abs()).all()):
            return decimals
    return None


def bounded(values: Tensor, times: float) -> Tensor:
    """``values`` clipped at so many times the median size of those that aren't zero.

    For answers that jump at times. It asks nothing of the key: bits that were fair coins before still are.
    """
    sizes = values.abs()[values != 0]
    most = times * float(sizes.median()) if len(sizes) else 0.0
    return values.clamp(-most, most)


def mean_by(values: Tensor, index: Tensor, n: int) -> Tensor:
    """Mean (n, L) of the rows (b, L) that share an index; zero where there is none."""
    total = torch.zeros(n, values.shape[1], dtype=values.dtype).index_add_(0, index, values)
    return total / torch.bincount(index, minlength=n).clamp_min(1)[:, None]
