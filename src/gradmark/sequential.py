"""Read a suspect step by step, betting on one bit after the other, and stop when enough is won.

Every bit is bet on once. What is asked, how often a bit is read before it is bet on, how much is
staked and when it ends may depend on all answers and on all bits already looked at, but never on
a bit that isn't: so the wealth is a test martingale (:mod:`gradmark.betting`), and whoever stops it
at any time holds a valid e-value. ``docs/sequential.md`` has the proof and the measurements.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gradmark.betting import Array, Bettor, gain
from gradmark.protocols import BlackBox
from gradmark.questions import Questions
from gradmark.scores import log_scores

BATCH = 8
_SPARE = 1.15  # bets are placed when they promise this many times what is missing
_SHARE = 0.1  # rounds grow with what was asked: few round trips, and no more than this asked in vain
_LATER = 0.5  # what a bit that wants more readings is worth beside one that can be bet on at once
_RIPE = 0.45  # nats, of the ln 2 there are, at which a bet needn't wait for clearer readings
_TRIALS = 4  # bets placed early, to learn what bets are worth, each time that cells were read twice as often
_TRUST = 8  # bits' worth of trust in that an unmarked network reads just the reference


@dataclass(frozen=True)
class Run:
    """What was won and how. ``values`` (n,): each bit's reading when it was bet on, zero if it wasn't;
    ``evidence``: (queries, log10 of the wealth) after each round; ``log10_best``: its maximum."""

    values: Tensor
    log10_e: float
    log10_best: float
    queries: int
    observations: int
    evidence: tuple[tuple[int, float], ...]
    usable: int


class Sequential:
    """One step-by-step reading of ``suspect``; all state of it."""

    def __init__(self, suspect: BlackBox, parts: Sequence[Questions], n_classes: int) -> None:
        self._suspect, self._classes = suspect, n_classes
        self._parts = [_Part(questions) for questions in parts]
        self._raw: list[Tensor] = []
        self.queries = 0

    @property
    def log_wealth(self) -> float:
        return sum(part.bettor.log_wealth for part in self._parts)

    def run(self, log10_target: float, queries: int, batch: int = BATCH) -> Run:
        """Go on until the wealth reaches 10**log10_target, or ``queries`` are spent or nothing is left."""
        target, best = log10_target * math.log(10), 0.0
        evidence: list[tuple[int, float]] = []
        while self.log_wealth < target:
            size = max(batch, int(_SHARE * self.queries))
            asked = self._next(min(size, queries - self.queries))
            if asked:
                self._ask(asked)
            best = max(best, self._bet(target, last=not asked))
            evidence.append((self.queries, self.log_wealth / math.log(10)))
            if not asked:
                break
        return Run(
            torch.cat([torch.from_numpy(part.placed) for part in self._parts]),
            self.log_wealth / math.log(10), best / math.log(10), self.queries,
            sum(len(part.cells) for part in self._parts), tuple(evidence),
            sum(part.bettor.bets for part in self._parts),
        )  # fmt: skip

    def _next(self, room: int) -> list[tuple[_Part, int, int]]:
        """The observations (part, cell, number) that promise most for each query, for ``room`` queries."""
        found: list[tuple[_Part, int, int]] = []
        counts = {id(part): part.counts() for part in self._parts}
        while True:
            rows = [(*part.best_cell(counts[id(part)]), part) for part in self._parts]
            rows = [row for row in rows if row[0] > 0 and row[2].questions.cost <= room]
            if not rows:
                return found
            _, cell, part = max(rows, key=lambda row: row[0])
            found.append((part, cell, int(counts[id(part)][cell])))
            counts[id(part)][cell] += 1
            room -= part.questions.cost

    def _ask(self, asked: list[tuple[_Part, int, int]]) -> None:
        inputs = torch.cat([part.questions.ask(cell, number) for part, cell, number in asked])
        answers = self._suspect.query(inputs)
        start = self.queries
        for part, cell, number in asked:
            part.note(cell, number, start)
            start += part.questions.cost
        self.queries = start
        self._raw.append(answers)
        # All answers are judged together: whether an API rounds shows only in many of them.
        scores = log_scores(torch.cat(self._raw), self._classes)
        for part in self._parts:
            part.reread(scores)

    def _bet(self, target: float, *, last: bool) -> float:
        """Place the bets that are due; returns the greatest wealth on the way, in nats."""
        best = self.log_wealth
        while (wealth := self.log_wealth) < target:
            offers = [(*part.offer(finished=last), part) for part in self._parts]
            due = [row for row in offers if row[3]]
            open_gain = sum(row[2] for row in offers)
            if not due and (open_gain < _SPARE * (target - wealth) or open_gain <= 0):
                return best
            _, bit, _, _, part = max(due or offers, key=lambda row: row[0])
            part.place(bit)
            best = max(best, self.log_wealth)
        return best


class _Part:
    """One scheme's questions, the answers so far, and its bettor."""

    def __init__(self, questions: Questions) -> None:
        self.questions, self.bettor = questions, Bettor()
        n = len(questions.bits)
        self.cells: list[int] = []
        self._numbers: list[int] = []
        self._starts: list[int] = []
        self._rooms = np.array(questions.rooms)
        self._cell_of = np.arange(n) // questions.width
        self._open = np.ones(n, dtype=bool)
        self._readings, self._noise, self._full = np.zeros(n), np.ones(n), np.zeros(n, dtype=bool)
        self._opinions = self.bettor.opinions(self._readings, self._noise)
        self._scale = 1.0
        self.placed = np.zeros(n)
        self._added, self._known = np.zeros(0), -1
        self._averaged = bool((self._rooms > 1).any())

    def counts(self) -> NDArray[np.int64]:
        """Observations (cells,) so far."""
        return np.bincount(np.array(self.cells, dtype=int), minlength=len(self._rooms)).astype(np.int64)

    def best_cell(self, counts: NDArray[np.int64]) -> tuple[float, int]:
        """Nats that one more observation of the most promising cell is expected to add per query."""
        bits = np.bincount(self._cell_of[self._open], minlength=len(self._rooms))
        able = (counts < self._rooms) & (bits > 0)
        if not able.any():
            return 0.0, 0
        steps = self._steps(int(counts[able].max()))
        added = bits * steps[np.minimum(counts, len(steps) - 1)] / self.questions.cost
        worth = np.where(able, added * (_LATER if self._averaged else 1.0), 0.0)
        cell = int(worth.argmax())
        return float(worth[cell]), cell

    def _steps(self, n: int) -> Array:
        """Nats that a bit's observation number 0, 1, ... n adds, by the bets so far."""
        if self._known != self.bettor.bets or len(self._added) <= n:
            count = np.arange(1, 2 * n + 9) if self._averaged else np.ones(1)
            promised = self.bettor.promise(1 / count if self._averaged else np.zeros(1))
            self._added, self._known = np.diff(promised, prepend=0.0), self.bettor.bets
        return self._added

    def note(self, cell: int, number: int, start: int) -> None:
        """The observation's answers are the scores from row ``start`` on."""
        self.cells.append(cell)
        self._numbers.append(number)
        self._starts.append(start)

    def reread(self, scores: Tensor) -> None:
        """Readings of the open bits from all answers (m, C), in units of one observation's noise."""
        if not self.cells:
            return
        cells = torch.tensor(self.cells)
        rows = torch.tensor(self._starts)[:, None] + torch.arange(self.questions.cost)
        values = self.questions.read(scores[rows], cells, torch.tensor(self._numbers)).double()
        count, n = self.counts(), len(self._open)
        total = torch.zeros(len(self._rooms), values.shape[1], dtype=torch.float64).index_add_(
            0, cells, values
        )
        means = total / torch.from_numpy(count).clamp_min(1)[:, None]
        self._scale = self._noise_of(values - means[cells], values, int((count - 1).clip(0).sum()))
        flat = self._unnatural(means.flatten()[:n].numpy())
        self._readings = flat / self._scale
        seen = count[self._cell_of]
        self._noise = 1 / np.maximum(seen, 1) if self._averaged else np.zeros(n)
        self._opinions = self.bettor.opinions(self._readings, self._noise)
        self._full = (count >= self._rooms)[self._cell_of]

    def _noise_of(self, residuals: Tensor, values: Tensor, freedom: int) -> float:
        """Standard deviation of one observation about its bit's mean; the typical size if none is known."""
        if self._averaged and freedom:
            found = float((residuals.square().sum() / (freedom * values.shape[1])).sqrt())
        else:
            sizes = values[values != 0].abs()
            found = float(sizes.median()) if len(sizes) else 0.0
        return found or self._scale

    def _unnatural(self, values: Array) -> Array:
        """Readings less what is natural: the reference, times how much of it these readings hold."""
        if self.questions.reference is None:
            return values
        reference = self.questions.reference.numpy()
        known = np.where(values == 0, 0.0, reference)
        trust = _TRUST * float(np.mean(reference**2))
        share = (values @ known + trust) / (known @ known + trust) if trust else 0.0
        without: Array = values - share * known
        return without

    def offer(self, *, finished: bool) -> tuple[float, int, float, bool]:
        """The best open bet's expected nats, its bit, those of all open bets, and whether it is due: its
        reading gets no clearer, or all is read (``finished``)."""
        can = self._open & (self._readings != 0)
        if not can.any():
            return -1.0, 0, 0.0, False
        nats = np.where(can, gain(self.bettor.believe(self._opinions)), -1.0)
        ripe = can & (self._full | finished)
        ripe |= can & (nats >= _RIPE)
        if self.bettor.bets < _TRIALS * math.log2(1 + len(self.cells) / len(set(self.cells))):
            ripe |= can & (nats == nats.max())
        pick = np.where(ripe, nats, -1.0) if ripe.any() else nats
        bit = int(pick.argmax())
        return float(pick[bit]), bit, float(nats[can].sum()), bool(ripe.any())

    def place(self, bit: int) -> None:
        """Bet on ``bit``, once and for all, and look at it."""
        self._open[bit] = False
        self.placed[bit] = self._readings[bit] * self._scale
        self.bettor.bet(float(self._readings[bit]), float(self._noise[bit]), float(self.questions.bits[bit]))
