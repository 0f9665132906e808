"""Exact one-sided tests of signed readings, in log10 so that nothing underflows.

A reading is multiplied by its bit; without the mark each product is as likely positive as negative, given
its size, because the bits come from the key and know nothing of the model. Only more positive products
than chance gives are evidence; an inverted mark is none.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import special, stats

from gradmark.errors import ModelError, UsageError
from gradmark.protocols import TestName
from gradmark.tails import log10_tail_binomial, log10_tail_subset_sum, log10_tails_subset_sum

RESOLUTION = 4096
_ROWS = 8192  # of signs that are floats at one time


@dataclass(frozen=True)
class TestResult:
    """``log10_p`` <= 0; ``statistic`` in the test's own unit; ``n`` usable (non-zero) values, ``n_match``
    of them positive; ``ties`` zeros left out."""

    log10_p: float
    statistic: float
    n: int
    n_match: int
    ties: int

    __test__ = False  # it isn't a test class, whatever pytest thinks


@dataclass(frozen=True)
class _Counted:
    """A test's integer statistic: the sum of a subset of ``weights``, uniformly random without the mark."""

    weights: tuple[int, ...]
    observed: int
    unit: float
    n: int
    n_match: int
    ties: int

    def log10_tail(self, observed: int) -> float:
        """log10 P[statistic >= observed] without the mark."""
        if all(weight == 1 for weight in self.weights):
            return log10_tail_binomial(len(self.weights), observed)
        return log10_tail_subset_sum(self.weights, observed)


def _usable(values: ArrayLike) -> tuple[NDArray[np.float64], int]:
    """The non-zero values (n,) as float64 and the number of zeros; ModelError on NaN and the like."""
    try:
        array = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError, RuntimeError) as e:
        raise ModelError("The readings aren't numbers", expected="a list of numbers", found=str(e)) from e
    if array.ndim != 1 or not np.isfinite(array).all():
        n_bad = int((~np.isfinite(array)).sum())
        raise ModelError(
            "The readings can't be tested",
            expected="finite numbers in one dimension",
            found=f"shape {array.shape} with {n_bad} NaN or infinite",
            fix="Check what the model answers on the carriers",
        )
    kept = array[array != 0]
    return kept, len(array) - len(kept)


def _count_weighted(
    values: NDArray[np.float64], ties: int, weights: NDArray[np.int64], unit: float
) -> _Counted:
    positive = values > 0
    observed = int(weights[positive].sum())
    return _Counted(tuple(weights.tolist()), observed, unit, len(values), int(positive.sum()), ties)


def _count_sign(values: ArrayLike) -> _Counted:
    kept, ties = _usable(values)
    return _count_weighted(kept, ties, np.ones(len(kept), dtype=np.int64), 1.0)


def _count_signed_rank(values: ArrayLike) -> _Counted:
    kept, ties = _usable(values)
    ranks = stats.rankdata(np.abs(kept), method="average") if len(kept) else np.zeros(0)
    return _count_weighted(kept, ties, np.rint(2 * ranks).astype(np.int64), 0.5)


def _count_sign_flip(values: ArrayLike, resolution: int = RESOLUTION) -> _Counted:
    if not 1 <= resolution <= 1 << 20:
        raise UsageError("The resolution is out of range", expected="1 to 2**20", found=str(resolution))
    kept, ties = _usable(values)
    sizes = np.abs(kept)
    relative = sizes / sizes.max() if len(kept) else sizes
    return _count_weighted(kept, ties, np.rint(relative * resolution).astype(np.int64), 1.0 / resolution)


def _result(counted: _Counted) -> TestResult:
    log10_p = counted.log10_tail(counted.observed)
    statistic = counted.observed * counted.unit
    return TestResult(log10_p, statistic, counted.n, counted.n_match, counted.ties)


def sign_test(values: ArrayLike) -> TestResult:
    """Exact sign test of values (n,), already multiplied by their bits; the statistic is the matches.

    Needs only that the signs are fair and independent. Zeros are left out. ModelError on NaN.
    """
    return _result(_count_sign(values))


def signed_rank_test(values: ArrayLike) -> TestResult:
    """Exact Wilcoxon signed-rank test of values (n,); the statistic is the rank sum of the positive ones.

    Tied magnitudes share their average rank and the test stays exact: it is conditional on the magnitudes.
    """
    return _result(_count_signed_rank(values))


def sign_flip_test(values: ArrayLike, resolution: int = RESOLUTION) -> TestResult:
    """Exact sign-flip test of the sum of values (n,), magnitudes rounded to max / resolution.

    The statistic is the sum of the rounded positive values, in units of the largest magnitude. Rounding looks
    at magnitudes alone, so the test of the rounded sum is exact itself.
    """
    return _result(_count_sign_flip(values, resolution))


TESTS: dict[TestName, Callable[[ArrayLike], TestResult]] = {
    "sign": sign_test,
    "signed-rank": signed_rank_test,
    "sign-flip": partial(sign_flip_test, resolution=RESOLUTION),
}
_COUNTS: dict[TestName, Callable[[ArrayLike], _Counted]] = {
    "sign": _count_sign,
    "signed-rank": _count_signed_rank,
    "sign-flip": _count_sign_flip,
}


def _known(name: str) -> None:
    if name not in TESTS:
        raise UsageError("No such test", expected=", ".join(TESTS), found=repr(name))


def run_test(name: TestName, values: ArrayLike) -> TestResult:
    """The test ``name`` of values (n,); UsageError if there is none."""
    _known(name)
    return TESTS[name](values)


def apart(values: ArrayLike, parts: tuple[int, ...] = ()) -> list[NDArray[np.float64]]:
    """Values (n,) by the parts they belong to, which have these sizes; in one piece if there are no two."""
    array = np.asarray(values, dtype=np.float64)
    return np.split(array, np.cumsum(parts)[:-1]) if len(parts) > 1 else [array]


def run_tests(name: TestName, values: ArrayLike, parts: tuple[int, ...] = ()) -> TestResult:
    """The test of each part of values (n,) by itself, combined; ``parts``: their sizes, none for one part.

    Without the mark the parts' signs are independent coins, so their p-values are independent and
    Fisher's product of them is exact up to their discreteness, which only makes it larger. A part with
    ties alone says nothing and is left out; that it does has nothing to do with the bits.
    """
    if len(parts) < 2:
        return run_test(name, values)
    results = [run_test(name, part) for part in apart(values, parts)]
    return TestResult(
        fisher([r.log10_p for r in results if r.n]),
        sum(r.statistic for r in results),
        sum(r.n for r in results),
        sum(r.n_match for r in results),
        sum(r.ties for r in results),
    )


def least_log10_p(values: ArrayLike, parts: tuple[int, ...] = ()) -> float:
    """log10 of p if all non-zero values (n,) matched their bits; ``parts`` as in :func:`run_tests`."""
    best = [-int(n) * math.log10(2) for piece in apart(values, parts) if (n := np.count_nonzero(piece))]
    return fisher(best)


def fisher(log10_ps: list[float]) -> float:
    """log10 P[a product of k uniform numbers <= the product of these], with s = -ln of it.

    The probability is e^-s times the sum of s^i / i! over i < k.
    """
    if not log10_ps:
        return 0.0
    return float(fisher_rows(np.asarray(log10_ps, dtype=np.float64)[:, None])[0])


def fisher_rows(log10_ps: NDArray[np.float64]) -> NDArray[np.float64]:
    """:func:`fisher` of each column of (k, m)."""
    if len(log10_ps) == 1:
        first: NDArray[np.float64] = log10_ps[0]
        return first
    s = np.maximum(-math.log(10) * log10_ps.sum(0), 1e-300)  # a product of ones
    i = np.arange(len(log10_ps))[:, None]
    terms = special.logsumexp(i * np.log(s) - special.gammaln(i + 1), axis=0)
    combined: NDArray[np.float64] = np.minimum(0.0, (terms - s) / math.log(10))
    return combined


@lru_cache(maxsize=16)
def _tails(weights: tuple[int, ...]) -> NDArray[np.float64]:
    """Kept, since one reading may be compared with many lists."""
    return log10_tails_subset_sum(weights)


def log10_ps(
    name: TestName, values: ArrayLike, signs: NDArray[np.int8], parts: tuple[int, ...] = ()
) -> NDArray[np.float64]:
    """(m,) log10 p of :func:`run_tests` for ``values`` (n,) times each row of ``signs`` (m, n).

    The sizes of the values are the same for all rows and so is the law without the mark, which is
    computed once: 100,000 rows cost one matrix product.
    """
    _known(name)
    stops = np.cumsum(parts[:-1]) if len(parts) > 1 else np.zeros(0, dtype=np.int64)
    found = []
    pieces = zip(apart(values, parts), np.split(signs, stops, axis=1), strict=True)
    for piece, own in pieces:
        weights = np.asarray(_COUNTS[name](np.abs(piece)).weights, dtype=np.float64)
        kept = piece != 0
        if not len(weights):
            continue
        tails = _tails(tuple(int(w) for w in weights))
        lean = weights * np.sign(piece[kept])
        total = weights.sum()
        twice = [own[a : a + _ROWS, kept] @ lean for a in range(0, len(own), _ROWS)]
        found.append(tails[np.rint((np.concatenate(twice) + total) / 2).astype(np.int64)])
    return fisher_rows(np.stack(found)) if found else np.zeros(len(signs))


def point_log10(name: TestName, values: ArrayLike) -> tuple[float, float]:
    """(log10 P[T >= observed], log10 P[T > observed]) without the mark; the second may be -inf."""
    _known(name)
    counted = _COUNTS[name](values)
    return counted.log10_tail(counted.observed), counted.log10_tail(counted.observed + 1)


def randomised_p(name: TestName, values: ArrayLike, generator: np.random.Generator) -> float:
    """P[T > observed] + U P[T = observed], exactly uniform on (0, 1) without the mark.

    Exact p-values are discrete, so a test of uniformity needs this form. Never for a verdict.
    """
    at_least, above = (10.0**value for value in point_log10(name, values))
    return float(above + generator.random() * (at_least - above))


def ks_uniform(p_values: ArrayLike) -> tuple[float, float]:
    """Kolmogorov-Smirnov distance of p_values (n,) from uniform on (0, 1), and its own two-sided p."""
    array = np.asarray(p_values, dtype=np.float64)
    if array.ndim != 1 or not len(array) or not ((array >= 0) & (array <= 1)).all():
        raise UsageError(
            "These aren't p-values", expected="a list of numbers in [0, 1]", found=f"{array.shape}"
        )
    result = stats.kstest(array, "uniform")
    return float(result.statistic), float(result.pvalue)


def bonferroni(log10_p: float, tried: int) -> float:
    """log10 of min(1, tried * p): the price of having tried several keys or tests."""
    if tried < 1:
        raise UsageError("The number of tries is too small", expected="1 or more", found=str(tried))
    return min(0.0, log10_p + math.log10(tried)) or 0.0


def wilson_interval(k: int, n: int, conf: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval of a proportion k / n; (0, 1) for n = 0."""
    if not 0 <= k <= n or not 0 < conf < 1:
        raise UsageError(
            "No such proportion", expected="0 <= k <= n, 0 < conf < 1", found=f"{k}, {n}, {conf}"
        )
    if n == 0:
        return 0.0, 1.0
    z2 = float(special.ndtri(0.5 + conf / 2)) ** 2
    centre = (k + z2 / 2) / (n + z2)
    half = math.sqrt(z2 * (k * (n - k) / n + z2 / 4)) / (n + z2)
    return (0.0 if k == 0 else max(0.0, centre - half)), (1.0 if k == n else min(1.0, centre + half))


def mean_interval(values: ArrayLike, conf: float = 0.95) -> tuple[float, float]:
    """Student's t interval of the mean of values (n,); infinite for a single value."""
    array = np.asarray(values, dtype=np.float64).ravel()
    if not len(array) or not np.isfinite(array).all() or not 0 < conf < 1:
        raise UsageError("No interval can be given", expected="finite values and 0 < conf < 1")
    if len(array) == 1:
        return -math.inf, math.inf
    half = float(stats.t.ppf(0.5 + conf / 2, len(array) - 1) * array.std(ddof=1) / math.sqrt(len(array)))
    return float(array.mean()) - half, float(array.mean()) + half
