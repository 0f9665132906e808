"""Exact tests against enumeration, big integers and scipy."""

from __future__ import annotations

import itertools
import math
from decimal import Decimal, localcontext
from fractions import Fraction
from typing import get_args

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats as sp

from gradmark import stats, tails
from gradmark.errors import ModelError, UsageError
from gradmark.protocols import TestName
from gradmark.stats import run_test
from gradmark.tails import log10_tail_binomial, log10_tail_subset_sum

NAMES = get_args(TestName)
reals = st.floats(-100, 100).map(lambda x: round(x, 1))  # rounding makes ties and zeros common


def log10_fraction(p: Fraction) -> float:
    with localcontext(prec=50):
        return float((Decimal(p.numerator) / p.denominator).log10()) if p else -math.inf


def big_integer_tail(weights: list[int], observed: int) -> float:
    """The whole polynomial in one Python integer."""
    slot, polynomial = len(weights) + 1, 1
    for w in weights:
        polynomial += polynomial << (slot * w)
    count, mask = 0, (1 << slot) - 1
    polynomial >>= slot * max(observed, 0)
    while polynomial:
        count += polynomial & mask
        polynomial >>= slot
    return log10_fraction(Fraction(count, 1 << len(weights)))


@given(st.integers(0, 300), st.integers(-2, 302))
@settings(deadline=None)
def test_binomial_exact(n: int, k: int) -> None:
    count = sum(math.comb(n, i) for i in range(max(k, 0), n + 1))
    assert log10_tail_binomial(n, k) == pytest.approx(log10_fraction(Fraction(count, 2**n)), abs=1e-12)


def test_binomial_scipy_and_large() -> None:
    for n, k in ((10, 7), (128, 90), (1000, 530)):
        assert 10 ** log10_tail_binomial(n, k) == pytest.approx(
            sp.binomtest(k, n, alternative="greater").pvalue, rel=1e-9
        )
    for n, k in ((5000, 4000), (20000, 10100), (20000, 15000), (20000, 9000), (20000, 20000)):
        exact = log10_tail_binomial(n, k)
        assert tails._log10_tail_binomial_large(n, k) == pytest.approx(exact, rel=1e-9, abs=1e-12)
    assert log10_tail_binomial(10**6, 10**6) == pytest.approx(-(10**6) * math.log10(2))
    assert str(log10_tail_binomial(20001, 5)) == "0.0"
    with pytest.raises(UsageError):
        log10_tail_binomial(-1, 0)


@given(st.lists(st.integers(0, 30), max_size=10), st.integers(-3, 200))
@settings(deadline=None, max_examples=200)
def test_subset_sum_enumerated(weights: list[int], observed: int) -> None:
    sums = [sum(w for w, use in zip(weights, uses, strict=True) if use)
            for uses in itertools.product((0, 1), repeat=len(weights))]  # fmt: skip
    p = Fraction(sum(s >= observed for s in sums), len(sums))
    assert log10_tail_subset_sum(weights, observed) == pytest.approx(log10_fraction(p), abs=1e-13)


@pytest.mark.parametrize("n", [20, 53, 54, 100, 200])
@pytest.mark.parametrize("share", [0.3, 0.5, 0.7, 0.9, 1.0])
def test_subset_sum_big_integers(n: int, share: float) -> None:
    weights = np.random.default_rng(n).integers(1, 60, n).tolist()
    observed = int(share * sum(weights))
    found, exact = log10_tail_subset_sum(weights, observed), big_integer_tail(weights, observed)
    assert found == pytest.approx(exact, rel=1e-12, abs=1e-12)
    assert found >= exact - 1e-15 * max(1.0, abs(exact))  # p is never understated


def test_subset_sum_beyond_the_range_of_floats() -> None:
    """With weights of 1 a subset sum is a binomial, known exactly for any n."""
    for n, k in ((1500, 700), (1500, 1000), (1500, 1500), (4000, 2300), (4000, 3900)):
        found, exact = log10_tail_subset_sum([1] * n, k), log10_tail_binomial(n, k)
        assert exact - 1e-12 <= found <= exact + 1e-9 * abs(exact) + 1e-9


def test_subset_sum_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    weights = list(range(1, 201))
    exact = [log10_tail_subset_sum(weights, s) for s in (9000, 12000, 14000, 18000)]
    monkeypatch.setattr(tails, "_MAX_WORK", 0)
    bound = [log10_tail_subset_sum(weights, s) for s in (9000, 12000, 14000, 18000)]
    assert bound[0] == 0.0
    for b, e in zip(bound, exact, strict=True):
        assert e <= b <= min(0.0, e + 1.7)
    with pytest.raises(UsageError):
        log10_tail_subset_sum([-1], 0)


@given(st.lists(reals, max_size=11), st.sampled_from(NAMES))
@settings(deadline=None, max_examples=200)
def test_tests_enumerated(values: list[float], name: TestName) -> None:
    """P of a statistic as high, over all signs of the same magnitudes."""
    v = np.array([x for x in values if x != 0])
    size = np.abs(v)
    weight = {
        "sign": np.ones(len(v)),
        "signed-rank": sp.rankdata(size) if len(v) else size,
        "sign-flip": np.rint(size / size.max() * 4096) if len(v) else size,
    }[name]
    observed = weight[v > 0].sum()
    signs = list(itertools.product((0, 1), repeat=len(v)))
    at_least = sum(float(np.dot(s, weight)) >= observed for s in signs) / len(signs)
    above = sum(float(np.dot(s, weight)) > observed for s in signs) / len(signs)
    result = run_test(name, values)
    assert 10**result.log10_p == pytest.approx(at_least, rel=1e-12)
    ge, gt = stats.point_log10(name, values)
    assert (10**ge, 10**gt) == (pytest.approx(at_least, rel=1e-12), pytest.approx(above, rel=1e-12))
    assert (result.n, result.ties) == (len(v), len(values) - len(v))
    assert result.n_match == int((v > 0).sum())


@given(st.integers(1, 50), st.integers(0, 2**32 - 1), st.floats(-1, 1))
@settings(deadline=None, max_examples=40)
def test_signed_rank_scipy(n: int, seed: int, shift: float) -> None:
    values = np.random.default_rng(seed).standard_normal(n) + shift
    expected = sp.wilcoxon(values, alternative="greater", method="exact")
    result = stats.signed_rank_test(values)
    assert 10**result.log10_p == pytest.approx(expected.pvalue, rel=1e-8)
    assert result.statistic == expected.statistic


@given(st.lists(reals, min_size=1, max_size=30), st.integers(0, 29), st.sampled_from(NAMES))
@settings(deadline=None, max_examples=100)
def test_turning_a_value_positive_is_evidence(values: list[float], i: int, name: TestName) -> None:
    i %= len(values)
    low, high = values.copy(), values.copy()
    low[i], high[i] = -abs(values[i]), abs(values[i])
    assert run_test(name, high).log10_p <= run_test(name, low).log10_p <= 0.0


@pytest.mark.parametrize("name", NAMES)
def test_edges(name: TestName) -> None:
    for nothing in ([], [0.0, -0.0]):
        result = run_test(name, nothing)
        assert (str(result.log10_p), result.n, result.ties) == ("0.0", 0, len(nothing))
    assert run_test(name, torch.ones(64)).log10_p == pytest.approx(-64 * math.log10(2))
    assert str(run_test(name, -np.ones(64)).log10_p) == "0.0"
    assert run_test(name, np.arange(1, 3001)).log10_p == pytest.approx(-3000 * math.log10(2))
    assert run_test(name, [5e-324, 1e308]).n_match == 2
    for bad in (
        [1, math.nan],
        [math.inf],
        [[1.0]],
        3.0,
        ["x"],
        [[1], [1, 2]],
        torch.ones(2, requires_grad=True),
    ):
        with pytest.raises(ModelError):
            run_test(name, bad)


def test_names_and_options() -> None:
    assert set(stats.TESTS) == set(NAMES)
    for call in (
        lambda: run_test("t", [1]),  # type: ignore[arg-type]
        lambda: stats.point_log10("t", [1]),  # type: ignore[arg-type]
        lambda: stats.sign_flip_test([1], resolution=0),
    ):
        with pytest.raises(UsageError):
            call()
    assert stats.sign_flip_test([3.0, -1.0], resolution=1).statistic == 1.0


@pytest.mark.statistics
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("n", [5, 60])
def test_uniform_without_a_mark(name: TestName, n: int) -> None:
    g = np.random.default_rng([n, NAMES.index(name)])
    sizes = np.abs(np.round(g.standard_cauchy(n), 1)) + 0.1
    drawn = [sizes * g.choice([-1, 1], n) for _ in range(600)]
    distance, p = stats.ks_uniform([stats.randomised_p(name, v, g) for v in drawn])
    assert p > 1e-3, distance
    log10_ps = np.array([run_test(name, v).log10_p for v in drawn])
    for alpha in (0.5, 0.1, 0.01):  # the plain p-value is at most as often small
        assert (
            sp.binomtest(int((10**log10_ps <= alpha).sum()), 600, alpha, alternative="greater").pvalue > 1e-4
        )


def test_ks_notices() -> None:
    g = np.random.default_rng(0)
    assert stats.ks_uniform(g.random(500) ** 2)[1] < 1e-6
    for bad in ([], [2.0], [math.nan]):
        with pytest.raises(UsageError):
            stats.ks_uniform(bad)


def test_bonferroni() -> None:
    assert stats.bonferroni(-8.0, 100) == pytest.approx(-6.0)
    assert stats.bonferroni(-8.0, 1) == -8.0
    assert str(stats.bonferroni(-0.1, 10)) == "0.0"
    assert str(stats.bonferroni(0.0, 1)) == "0.0"
    with pytest.raises(UsageError):
        stats.bonferroni(-1.0, 0)


@given(st.integers(1, 500), st.floats(0, 1), st.sampled_from([0.5, 0.9, 0.95, 0.999]))
@settings(deadline=None, max_examples=50)
def test_wilson(n: int, share: float, conf: float) -> None:
    k = round(share * n)
    expected = sp.binomtest(k, n).proportion_ci(conf, method="wilson")
    assert stats.wilson_interval(k, n, conf) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_intervals() -> None:
    assert stats.wilson_interval(0, 0) == (0.0, 1.0)
    assert stats.mean_interval([1.0]) == (-math.inf, math.inf)
    assert stats.mean_interval([1, 2, 3]) == pytest.approx(
        (2 - 4.30265 / 3**0.5, 2 + 4.30265 / 3**0.5), abs=1e-4
    )
    for call in (
        lambda: stats.wilson_interval(3, 2),
        lambda: stats.mean_interval([]),
        lambda: stats.mean_interval([math.nan, 1]),
    ):
        with pytest.raises(UsageError):
            call()


# -- several parts


def test_fisher_is_the_chi_square_of_the_logarithms() -> None:
    """-2 ln of k uniform numbers' product is chi-square with 2k degrees of freedom."""
    for k in range(1, 6):
        for share in ([1.0] * k, [0.0] * (k - 1) + [k], list(range(1, k + 1))):
            for total in (1e-9, 0.01, 0.5, 3.0, 30.0, 400.0, 2000.0):
                logs = [-total * s / sum(share) for s in share]
                statistic = -2 * math.log(10) * sum(logs)
                exact = sp.chi2.logsf(statistic, 2 * k) / math.log(10)
                if math.isfinite(exact):  # scipy's own runs out of floats at some 1e-300
                    assert stats.fisher(logs) == pytest.approx(exact, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("t", [0.9, 0.3, 1e-3, 1e-30, 1e-200])
def test_fisher_is_the_integral(t: float) -> None:
    """P[u <= t] = t, and P[u v <= t] = integral of P[v <= t / u] over u, step by step."""
    logs, chance = math.log(t), [t]
    chance.append(t * (1 - logs))
    chance.append(t * (1 - logs + logs**2 / 2))
    for k, p in enumerate(chance, 1):
        assert stats.fisher([math.log10(t) / k] * k) == pytest.approx(math.log10(p), rel=1e-9, abs=1e-12)
    if t > 1e-10:
        grid = (np.arange(200_000) + 0.5) / 200_000
        assert np.minimum(1, t / grid).mean() == pytest.approx(chance[1], rel=1e-3)


def test_fisher_by_simulation() -> None:
    generator, n = np.random.default_rng(8), 40_000
    for k in (2, 3):
        found = np.array([stats.fisher(row) for row in np.log10(generator.random((n, k))).tolist()])
        assert stats.ks_uniform(10**found)[1] > 0.001


def test_fisher_at_the_ends() -> None:
    assert stats.fisher([0.0, 0.0, 0.0]) == 0.0
    assert stats.fisher([]) == 0.0
    assert stats.fisher([-5.0]) == pytest.approx(-5.0, abs=1e-12)
    assert stats.fisher([-5.0, 0.0]) == pytest.approx(-5 + math.log10(1 + 5 * math.log(10)))
    assert stats.fisher([-4000.0, -4000.0]) == pytest.approx(-8000 + math.log10(1 + 8000 * math.log(10)))
    falling = [stats.fisher([-x, -1.0]) for x in np.linspace(0, 50, 200)]
    assert falling == sorted(falling, reverse=True)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("parts", [(3, 4), (1, 6), (2, 2, 3), (0, 7)])
def test_combined_p_values_are_valid(name: TestName, parts: tuple[int, ...]) -> None:
    """P[p <= t] <= t for every t, over all signs: discreteness makes p larger, never smaller."""
    sizes = np.random.default_rng(sum(parts)).integers(1, 4, 7).astype(float)
    signs = np.array(list(itertools.product((-1, 1), repeat=7)))
    found = np.array([10 ** stats.run_tests(name, row, parts).log10_p for row in signs * sizes])
    for t in np.unique(found):
        assert (found <= t * (1 + 1e-12)).mean() <= t * (1 + 1e-9)
    best = stats.run_tests(name, sizes, parts).log10_p
    assert best == pytest.approx(math.log10(found.min()))
    assert best == pytest.approx(stats.least_log10_p(sizes, parts))


def test_parts_are_tested_apart() -> None:
    values = np.random.default_rng(5).normal(size=30) + 0.5
    values[[2, 20]] = 0
    whole = stats.run_tests("signed-rank", values, (10, 20))
    apart = [run_test("signed-rank", part) for part in (values[:10], values[10:])]
    assert whole.log10_p == pytest.approx(stats.fisher([r.log10_p for r in apart]))
    assert (whole.n, whole.ties) == (28, 2)
    assert whole.n_match == sum(r.n_match for r in apart)
    scaled = np.concatenate([values[:10], 1000 * values[10:]])
    assert stats.run_tests("sign-flip", scaled, (10, 20)).log10_p == pytest.approx(
        stats.run_tests("sign-flip", values, (10, 20)).log10_p, rel=0.05
    ), "parts may have units of their own"
    for one in ((), (30,)):
        assert stats.run_tests("signed-rank", values, one) == run_test("signed-rank", values)
    assert stats.least_log10_p(values) == pytest.approx(-28 * math.log10(2))
    assert stats.least_log10_p(np.zeros(4), (2, 2)) == 0.0
