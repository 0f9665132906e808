"""Bets on secret bits: exact expectations by enumeration, suspects that cheat, slow oracles."""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from gradmark import catalog
from gradmark.betting import _DOUBT, _NATURAL, _SIGNALS, _SURE, Bettor, gain, information
from gradmark.codec import MarkFile
from gradmark.data import load_data
from gradmark.errors import UsageError
from gradmark.keys import OwnerKey
from gradmark.protocols import Batch, Verdict
from gradmark.questions import Questions
from gradmark.sequential import Run, Sequential
from gradmark.suspects import CallableSuspect
from gradmark.verify import verify
from test_golden import CARRIERS, KEY, MARKS, suspect, without_references

CLASSES = 4


def questions(bits: list[float], width: int = 1, room: int = 1, name: int = 0) -> Questions:
    """Cells whose inputs say where they come from: (part, cell, number); a reading is one class's score."""
    n = len(bits)

    def ask(cell: int, number: int) -> Tensor:
        return torch.tensor([[float(name), float(cell), float(number)]])

    return Questions(torch.tensor(bits), width, 1, (room,) * -(-n // width), ask, read_first(width))


def read_first(width: int) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    return lambda scores, cells, numbers: scores[:, 0, :width] - scores[:, 0, -1:]


def run_with(parts: list[Questions], answer: Callable[[Tensor], Tensor], target: float, queries: int) -> Run:
    suspect = CallableSuspect(answer, name="test")
    return Sequential(suspect, parts, CLASSES).run(target, queries, batch=3)


class Nasty:
    """Answers by what it was asked so far, and so by every bit that was looked at: numbers of wild sizes,
    ties, and rounded ones, drawn from a seed."""

    def __init__(self, seed: int) -> None:
        self.state = hashlib.sha256(bytes([seed]))

    def __call__(self, x: Tensor) -> Tensor:
        rows = []
        for row in x:
            self.state.update(row.numpy().tobytes())
            rng = np.random.default_rng(list(self.state.digest()))
            scores = rng.normal(size=CLASSES) * 10.0 ** rng.integers(-2, 3)
            rows.append(np.where(rng.random(CLASSES) < 0.15, 0.0, np.round(scores, 2)))
        return torch.tensor(np.array(rows), dtype=torch.float32)


def wealths(seed: int, target: float, queries: int) -> list[Run]:
    """A run for every one of the 2**7 ways in which the secret bits can have fallen."""
    found = []
    for bits in itertools.product([-1.0, 1.0], repeat=7):
        parts = [questions(list(bits[:3])), questions(list(bits[3:]), width=2, room=4, name=1)]
        found.append(run_with(parts, Nasty(seed), target, queries))
    return found


@pytest.mark.parametrize(("target", "queries", "seed"), [(9.0, 40, 0), (0.5, 40, 1), (0.2, 7, 2)])
def test_the_expected_wealth_is_one_however_it_stops(target: float, queries: int, seed: int) -> None:
    runs = wealths(seed, target, queries)
    mean = sum(10**run.log10_e for run in runs) / len(runs)
    assert mean == pytest.approx(1.0, abs=1e-9)
    for alpha in (0.5, 0.2, 0.05):  # Ville's inequality, exactly
        assert sum(10**run.log10_best >= 1 / alpha for run in runs) / len(runs) <= alpha


def test_looking_at_a_bit_before_betting_would_be_noticed() -> None:
    """The enumeration can fail: readings that know their bits raise the mean."""
    total = 0.0
    for bits in itertools.product([-1.0, 1.0], repeat=6):

        def tells(x: Tensor, bits: tuple[float, ...] = bits) -> Tensor:
            return torch.tensor([[bits[int(row[1])], 0, 0, 0] for row in x])

        total += 10 ** run_with([questions(list(bits))], tells, 9.0, 40).log10_e
    assert total / 64 > 5


readings = st.floats(-4, 4, allow_nan=False).map(lambda v: round(v, 3))


@given(
    st.lists(st.tuples(readings, st.sampled_from([0.0, 0.1, 1.0]), st.sampled_from([-1.0, 1.0])), max_size=9)
)
def test_the_bettor_against_a_plain_mixture(bets: list[tuple[float, float, float]]) -> None:
    bettor = Bettor()
    for reading, noise, bit in bets:
        q = float(bettor.predict(np.array([reading]), np.array([noise]))[0])
        assert 0 < q < 1 and (reading != 0 or q == pytest.approx(0.5))
        got = bettor.bet(reading, noise, bit)
        assert got == pytest.approx(math.log(2 * (q if bit > 0 else 1 - q)), abs=1e-9)
    experts = [(_DOUBT, 0.0, 1.0)]
    grid = [(s, t) for s in _SIGNALS for t in _NATURAL]
    experts += [((1 - _DOUBT) / len(grid), s, t) for s, t in grid]
    total = 0.0
    for weight, s, t in experts:
        for reading, noise, bit in bets:
            up = 0.5 + (0.5 - _SURE) * math.tanh(s * reading / (t * t + max(noise, 1e-3)))
            weight *= 2 * (up if bit > 0 else 1 - up)
        total += weight
    assert bettor.log_wealth == pytest.approx(math.log(total), abs=1e-9)


def test_information_against_simulation_and_its_ends() -> None:
    rng = np.random.default_rng(0)
    for snr in (0.05, 1.0, 4.0):
        y = math.sqrt(snr) + rng.normal(size=400_000)
        simulated = math.log(2) - np.log1p(np.exp(-2 * math.sqrt(snr) * y)).mean()
        assert float(information(np.array([snr]))[0]) == pytest.approx(simulated, abs=3e-3)
    assert information(np.array([0.0, 1e4])) == pytest.approx([0.0, math.log(2)], abs=1e-6)
    assert gain(np.array([0.5, 1.0])) == pytest.approx([0.0, math.log(2)])


def marked(bits: list[float], strength: float, seed: int = 0) -> Callable[[Tensor], Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def answer(x: Tensor) -> Tensor:
        scores = torch.randn(len(x), CLASSES, generator=generator)
        for row, (_, cell, _) in zip(scores, x.tolist(), strict=True):
            row[:2] += strength * torch.tensor(bits[2 * int(cell) : 2 * int(cell) + 2])
        return scores

    return answer


def test_a_mark_is_found_with_few_queries_and_the_run_stops() -> None:
    bits = [1.0 if i % 3 else -1.0 for i in range(80)]
    strong = run_with([questions(bits, 2, 200)], marked(bits, 2.0), 9.0, 4000)
    weak = run_with([questions(bits, 2, 200)], marked(bits, 0.4), 9.0, 4000)
    none = run_with([questions(bits, 2, 200)], marked(bits, 0.0), 9.0, 1000)
    assert strong.log10_e >= 9 and weak.log10_e >= 9 and none.log10_e < 2
    assert strong.queries < 120 < weak.queries < 1500 and none.queries == 1000
    assert [q for q, _ in strong.evidence] == sorted(q for q, _ in strong.evidence)
    assert strong.evidence[-1] == (strong.queries, strong.log10_e)


def test_queries_go_where_they_tell() -> None:
    """Of two parts, one dead and one alive, the living one gets most of the queries."""
    bits = [1.0 if i % 3 else -1.0 for i in range(80)]
    asked = [0, 0]

    def answer(x: Tensor) -> Tensor:
        for part in (0, 1):
            asked[part] += int((x[:, 0] == part).sum())
        alive = marked(bits, 0.8, len(x))(x)
        return torch.where(x[:, :1] == 1, alive, torch.randn(x.shape[0], CLASSES))

    torch.manual_seed(0)
    parts = [questions(bits, 2, 200), questions(bits, 2, 200, name=1)]
    assert run_with(parts, answer, 9.0, 4000).log10_e >= 9
    assert asked[1] > 1.5 * asked[0]


def test_each_bit_is_bet_on_once_and_a_tie_never() -> None:
    bits = [1.0, -1.0, 1.0, -1.0]
    run = run_with([questions(bits)], lambda x: torch.zeros(len(x), CLASSES), 9.0, 40)
    assert (run.usable, run.log10_e, run.queries) == (0, 0.0, 4)
    run = run_with([questions(bits)], lambda x: torch.tensor([[5.0, 0, 0, -1]]).repeat(len(x), 1), 9.0, 40)
    assert run.usable == 4 and run.values.tolist() == [6.0] * 4


# --- by verify, on a real mark ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def images() -> Batch:
    pytest.importorskip("sklearn")
    return load_data("digits").test.batch(slice(0, CARRIERS))


def judged(pool: Batch, key: OwnerKey = KEY, mark: MarkFile = MARKS["ensemble"], **more: Any) -> Verdict:
    return verify(mark, key, suspect("ensemble"), pool, access="black", sequential=True, **more)


def test_the_golden_ensemble_is_found_with_a_few_dozen_queries(images: Batch) -> None:
    verdict = judged(images, queries=2000)
    assert (verdict.outcome, verdict.test, verdict.access) == ("owned", "betting", "black")
    assert verdict.log10_e is not None and verdict.log10_e >= 6 and verdict.queries < 300
    assert verdict.log10_p == pytest.approx(-verdict.log10_e)
    assert verdict.evidence[-1] == (verdict.queries, verdict.log10_e)
    tried = judged(images, queries=2000, keys_tried=1000)
    assert tried.log10_p <= -6 and tried.log10_e is not None and tried.log10_e >= 9
    wrong = OwnerKey(bytes(32), "Acme Ltd")
    mark = MARKS["ensemble"]
    own = MarkFile.create(wrong, mark.scheme, without_references(mark), mark.spec, mark.test, mark.carriers)
    assert judged(images, wrong, own, queries=200).outcome == "no-evidence"
    assert judged(images, queries=2).outcome == "inconclusive"


def test_what_cant_be_read_step_by_step_is_refused(images: Batch) -> None:
    with pytest.raises(UsageError, match="Only a black box"):
        verify(MARKS["ensemble"], KEY, suspect("ensemble"), images, sequential=True)
    scheme = catalog.scheme("weights")
    mark = MarkFile.create(KEY, scheme.name, scheme.parameters(), MARKS["ensemble"].spec, "sign", 20)
    with pytest.raises(UsageError, match="can't be read step by step"):
        judged(images, mark=mark)
