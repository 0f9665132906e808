"""How anything here is measured: AUC with its interval, paired bootstrap, and a plain classifier.

An AUC is the chance that a random positive scores higher than a random negative, ties counted half;
.5 is blind. Intervals are two-sided at 95 %.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from scipy import stats
from torch import Tensor

from gradmark.errors import UsageError
from gradmark.protocols import Access

RESAMPLES = 400
Z95 = 1.959964
STRIKING_Z = 4.0  # beyond the luck of the inputs
_NO_LUCK = 1e-6  # spread of an effect that no choice of inputs moves, so that z means nothing


@dataclass(frozen=True)
class Interval:
    """A number and its 95 % interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Detector:
    """What one way to look found. Side by side: ``model`` and ``control``, with the control's interval
    ``low`` to ``high`` over resampled inputs (or weights, or keys), the ``effect`` and its ``z``. A detector
    that scores single queries: ``auc`` with its interval.

    ``effect`` is log(model / control), or another distance where the statistic has a sign. ``striking`` if
    the effect exceeds ``tolerance`` (about as much as two unmarked trainings differ) and the luck of
    the sample both; for an AUC, if the interval lies beyond .5 by more than ``tolerance``.
    """

    name: str
    part: str
    access: Access
    low: float
    high: float
    tolerance: float
    striking: bool
    model: float | None = None
    control: float | None = None
    effect: float | None = None
    z: float | None = None
    auc: float | None = None
    note: str = ""

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values; infinite z as a large number."""
        row = asdict(self)
        row["statistic"] = row["auc"] if self.auc is not None else row["model"]
        return {name: _finite(value) for name, value in row.items()}


def side_by_side(
    name: str, part: str, model: Tensor, control: Tensor, tolerance: float, note: str = ""
) -> Detector:
    """Compare a positive statistic. ``model``, ``control`` (1 + B,): the value, then B resampled alike."""
    ratio = (model.clamp_min(1e-12) / control.clamp_min(1e-12)).log()
    effect, spread = float(ratio[0]), float(ratio[1:].std())
    half = Z95 * float(control[1:].std())
    z = effect / max(spread, 1e-9)
    shown = z if spread > _NO_LUCK else None
    return Detector(
        name, part, "white", float(control[0]) - half, float(control[0]) + half, tolerance,
        abs(effect) > tolerance and abs(z) > STRIKING_Z, float(model[0]), float(control[0]), effect, shown,
        note=note,
    )  # fmt: skip


def scored(
    name: str, part: str, access: Access, positive: ArrayLike, negative: ArrayLike, tolerance: float,
    note: str = "", two_sided: bool = False,
) -> Detector:  # fmt: skip
    """A detector that gives single queries a score; ``two_sided`` where it knows no direction."""
    found = auc_interval(positive, negative)
    striking = found.low > 0.5 + tolerance or (two_sided and found.high < 0.5 - tolerance)
    return Detector(
        name, part, access, found.low, found.high, tolerance, striking, auc=found.value, note=note
    )


def auc_interval(positive: ArrayLike, negative: ArrayLike) -> Interval:
    """AUC of scores (m,) against (n,), with DeLong's interval (DeLong et al., Biometrics 1988).

    Where all or no pairs are in order DeLong's variance is zero; then the rule of three for
    min(m, n) cases bounds the interval. UsageError unless each side has two finite scores.
    """
    x, y = (np.asarray(v, dtype=np.float64).ravel() for v in (positive, negative))
    if min(len(x), len(y)) < 2 or not (np.isfinite(x).all() and np.isfinite(y).all()):
        raise UsageError("No AUC can be given", expected="two or more finite scores on each side")
    m, n = len(x), len(y)
    ranks = stats.rankdata(np.concatenate([x, y]))
    above = (ranks[:m] - stats.rankdata(x)) / n  # share of negatives below each positive
    below = 1 - (ranks[m:] - stats.rankdata(y)) / m
    value = float(above.mean())
    half = Z95 * math.sqrt(above.var(ddof=1) / m + below.var(ddof=1) / n)
    if value in (0.0, 1.0):
        half = 3 / min(m, n)
    return Interval(value, max(0.0, value - half), min(1.0, value + half))


def resampling(n: int, generator: torch.Generator, resamples: int = RESAMPLES) -> Tensor:
    """Weights (1 + B, n), rows summing to 1: the sample itself, then bootstrap resamples of it."""
    drawn = torch.randint(n, (resamples, n), generator=generator)
    counts = torch.zeros(resamples, n).scatter_add_(1, drawn, torch.ones(resamples, n))
    return torch.cat([torch.ones(1, n), counts]) / n


def percentiles(values: Tensor) -> Interval:
    """The first of ``values`` (1 + B,) and the middle 95 % of the others."""
    low, high = torch.quantile(values[1:].double(), torch.tensor([0.025, 0.975], dtype=torch.float64))
    return Interval(float(values[0]), float(low), float(high))


def discriminant(
    train: NDArray[np.float64], is_positive: NDArray[np.bool_], test: NDArray[np.float64], ridge: float = 0.1
) -> NDArray[np.float64]:
    """Scores (t,) of ``test`` (t, f) by Fisher's linear discriminant on features and their squares.

    ``train`` (n, f), standardised by its spread within each kind; the covariance is shrunk by ``ridge``.
    """
    sides = train[is_positive], train[~is_positive]
    centre = (sides[0].mean(0) + sides[1].mean(0)) / 2
    # within the kinds: what tells them apart must not be scaled down for it
    spread = np.sqrt((sides[0].var(0) + sides[1].var(0)) / 2) + 1e-9

    def expand(rows: NDArray[np.float64]) -> NDArray[np.float64]:
        unit = np.clip((rows - centre) / spread, -6, 6)
        return np.concatenate([unit, unit**2 / 2], 1)

    known = expand(train)
    yes, no = known[is_positive], known[~is_positive]
    within = np.concatenate([yes - yes.mean(0), no - no.mean(0)])
    covariance = within.T @ within / max(1, len(within) - 2)
    size = np.trace(covariance) / len(covariance)
    covariance += (ridge * size + 1e-9) * np.eye(len(covariance))
    direction = np.linalg.solve(covariance, yes.mean(0) - no.mean(0))
    scores: NDArray[np.float64] = expand(test) @ direction
    return scores


def _finite(value: Any) -> Any:
    return round(max(-1e9, min(1e9, value)), 6) if isinstance(value, float) else value
