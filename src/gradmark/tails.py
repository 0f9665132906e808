"""Exact tails of binomials and subset sums, in log10 so that nothing underflows."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy import special

from gradmark.errors import UsageError

_LOG10_2 = math.log10(2.0)
_EXACT_BINOMIAL = 20_000
_MAX_WORK = 2_000_000_000
"""Additions that :func:`log10_tail_subset_sum` may do (about two seconds) before it turns to a bound."""


def _log10_ratio(mantissa: float, exponent: int) -> float:
    """log10(mantissa * 2**exponent) in (-inf, 0]; accurate also next to 0."""
    fraction, shift = math.frexp(mantissa)
    value = math.log10(fraction) + (shift + exponent) * _LOG10_2
    return min(value, 0.0) or 0.0  # ``or`` turns -0.0 into 0.0


def log10_tail_binomial(n: int, k: int) -> float:
    """log10 P[Bin(n, 1/2) >= k] = log10(sum_{i=k..n} C(n, i) / 2**n); -inf for k > n.

    Exact integers up to n = 20000, rounded once at the end; beyond, a series of positive terms (relative
    error of p below 1e-6 at n = 1e6).
    """
    if n < 0:
        raise UsageError("The number of trials is negative", expected="0 or more", found=str(n))
    if k <= 0:
        return 0.0
    if k > n:
        return -math.inf
    if n > _EXACT_BINOMIAL:
        return _log10_tail_binomial_large(n, k)
    upper = 2 * k > n
    term = total = 1  # C(n, 0), C(n, 1), ...: C(n, n - i) = C(n, i)
    for i in range(1, n - k + 1 if upper else k):
        term = term * (n - i + 1) // i
        total += term
    count = total if upper else (1 << n) - total
    shift = max(count.bit_length() - 64, 0)
    return _log10_ratio(float(count >> shift), shift - n)


def _log10_tail_binomial_large(n: int, k: int) -> float:
    """As log10_tail_binomial for any n: the regularised incomplete beta, or its series if that underflows."""
    p = float(special.betainc(k, n - k + 1, 0.5))
    if p > 1e-250:
        return min(math.log10(p), 0.0) or 0.0
    # sum_{i>=k} C(n, i) = C(n, k) (1 + (n-k)/(k+1) + ...); here k is far above n / 2: it converges fast.
    total, term, i = 1.0, 1.0, k
    while i < n and term > total * 1e-18:
        term *= (n - i) / (i + 1)
        total += term
        i += 1
    log_choose = special.gammaln(n + 1) - special.gammaln(k + 1) - special.gammaln(n - k + 1)
    return float(log_choose / math.log(10) + math.log10(total) - n * _LOG10_2)


def log10_tail_subset_sum(weights: Sequence[int], observed: int) -> float:
    """log10 P[sum of a uniformly random subset of ``weights`` >= observed]; -inf if no subset reaches it.

    Counts the complements, the subsets with sum <= total - observed, by one pass over the weights
    (``count[s] += count[s - w]``), cut off at that sum: strong evidence costs next to nothing. The counts are
    float64, exact below 2**53, hence for up to 53 weights. Beyond, only positive numbers are added, so p is
    off by a factor within 1 +- n 2**-53, and the result is raised by that: but for the rounding of the
    final logarithm it never understates p. Counts too small for the range of float64 (only with over 1000
    weights) are rounded up. Too large a task for two seconds gets Chernoff's bound, which is rigorous
    as well. Raises UsageError on negative weights.
    """
    used = sorted(int(weight) for weight in weights if weight)
    if used and used[0] < 0:
        raise UsageError("A weight is negative", expected="0 or more", found=str(used[0]))
    slack = sum(used) - int(observed)
    if slack < 0:
        return -math.inf
    if observed <= 0:
        return 0.0
    divisor = math.gcd(*used)
    small = [weight // divisor for weight in used if weight <= slack]
    slack = min(slack // divisor, sum(small))
    if len(small) * (slack + 1) > _MAX_WORK:
        return _chernoff(np.array(used, dtype=np.float64), float(observed))
    counts, exponent = _count_subsets(small, slack)
    total, n = float(counts.sum()), len(used)
    value = _log10_ratio(total, exponent - n)
    if total >= 2.0**53 or exponent:
        value += (len(small) + 64) * 2.0**-53 / math.log(10)
    return min(value, 0.0) or 0.0


def log10_tails_subset_sum(weights: Sequence[int]) -> NDArray[np.float64]:
    """(total + 1,) log10 P[sum of a random subset of ``weights`` >= s] for every s: one pass for all of them.

    As accurate as :func:`log10_tail_subset_sum`, and raised by the bound of the rounding in the same way.
    Raises UsageError on negative weights, or where it would take more than about two seconds.
    """
    used = sorted(int(weight) for weight in weights)
    total = sum(used)
    if used and (used[0] < 0 or len(used) * (total + 1) > _MAX_WORK):
        raise UsageError(
            "The weights can't be tested all at once",
            expected=f"weights of 0 or more, at most {_MAX_WORK} additions",
            found=f"{len(used)} weights that sum to {total}",
        )
    counts, exponent = _count_subsets([w for w in used if w], total)
    n = sum(1 for w in used if w)
    at_most = np.cumsum(counts)[::-1]  # subsets whose complement sums to total - s or less
    rounding = (n + total + 64) * 2.0**-53 / math.log(10)
    found: NDArray[np.float64] = np.log10(at_most) + (exponent - n) * _LOG10_2 + rounding
    return np.minimum(found, 0.0)


def _count_subsets(weights: list[int], top: int) -> tuple[NDArray[np.float64], int]:
    """counts (top + 1,) and an exponent e: counts[s] * 2**e subsets of the sorted weights sum to s."""
    counts = np.zeros(top + 1)
    counts[0] = 1.0
    reach, exponent = 0, 0
    for i, weight in enumerate(weights, start=1):
        grown = min(reach + weight, top)
        # numpy buffers the overlap, so each weight is used once.
        counts[weight : grown + 1] += counts[: grown + 1 - weight]
        reach = grown
        if i % 400 == 0 and (peak := float(counts.max())) > 2.0**400:
            shift = math.frexp(peak)[1]
            floor = np.where(counts > 0, 2.0**-1000, 0.0)  # rounding up keeps p an upper bound
            counts = np.maximum(np.ldexp(counts, -shift), floor)
            exponent += shift
    return counts, exponent


def _chernoff(weights: NDArray[np.float64], observed: float) -> float:
    """Bound of log10 p: least -t (observed - total/2) + sum log cosh(t w / 2) over some t > 0, all valid."""
    excess = observed - float(weights.sum()) / 2
    if excess <= 0:
        return 0.0
    best = 0.0
    for t in np.geomspace(1e-6, 1e2, 161) / float(weights.mean()):
        half = weights * (t / 2)
        cost = float(np.sum(half + np.log1p(np.exp(-2 * half)) - math.log(2)))
        rounding = 1e-12 * (float(half.sum()) + t * excess)
        best = min(best, float(cost - t * excess + rounding))
    return best / math.log(10)
