"""Does a step-by-step reading keep its promise? P(sup e >= 1 / alpha) <= alpha, for suspects that cheat.

    python benchmarks/nulls.py [--runs 2000] [--out benchmarks/results/queries/nulls.json]

Each suspect answers without the secret bits, but knows the plan, and some see every bit that was looked at.
Every run draws fresh bits and goes on to the end, whatever was won.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from gradmark.questions import Questions
from gradmark.sequential import Sequential
from gradmark.stats import wilson_interval
from gradmark.suspects import CallableSuspect

OUT = Path(__file__).parent / "results" / "queries" / "nulls.json"
CLASSES, SINGLE, WIDTH, CELLS, ROOM = 9, 24, 8, 4, 8
ALPHAS = (0.1, 0.01, 0.001)


def parts(rng: np.random.Generator) -> list[Questions]:
    """24 bits read once, and 32 in four cells that can be read eight times, like triggers and classes."""

    def ask(name: int):
        return lambda cell, number: torch.tensor([[float(name), float(cell), float(number)]])

    def bits(n: int) -> Tensor:
        return torch.from_numpy(rng.choice([-1.0, 1.0], n)).float()

    def contrast(width: int):
        return lambda scores, cells, numbers: scores[:, 0, :width] - scores[:, 0, -1:]

    return [
        Questions(bits(SINGLE), 1, 1, (1,) * SINGLE, ask(0), contrast(1)),
        Questions(bits(CELLS * WIDTH), WIDTH, 1, (ROOM,) * CELLS, ask(1), contrast(WIDTH)),
    ]


class Suspect:
    """``kind``: how it answers. ``reading`` is set to the running reading, whose seen bits it may use."""

    def __init__(self, kind: str, rng: np.random.Generator) -> None:
        self.kind, self.rng, self.reading = kind, rng, None
        self.natural = rng.normal(size=(2, 64, CLASSES)) * 2
        self.guess = rng.choice([-1.0, 1.0], CLASSES)

    def __call__(self, x: Tensor) -> Tensor:
        where = x.numpy().astype(int)
        out = getattr(self, self.kind)(where)
        out[:, -1] = 0
        return torch.from_numpy(out).float()

    def innocent(self, where: np.ndarray) -> np.ndarray:
        """Like a network of its own training: natural readings, and noise."""
        return self.natural[where[:, 0], where[:, 1]] + self.rng.normal(size=(len(where), CLASSES))

    def wild(self, where: np.ndarray) -> np.ndarray:
        """Sizes over six decades, drawn anew for every answer."""
        size = 10.0 ** self.rng.uniform(-3, 3, (len(where), 1))
        return size * self.rng.normal(size=(len(where), CLASSES))

    def sure(self, where: np.ndarray) -> np.ndarray:
        """The same guess at all bits, with great confidence and no noise."""
        return np.repeat(10 * self.guess[None], len(where), 0)

    def follower(self, where: np.ndarray) -> np.ndarray:
        """Guesses that the bits to come fall as most bits that were looked at."""
        seen = self._seen()
        return np.full((len(where), CLASSES), float(np.sign(seen.sum()) or 1.0) * (1 + len(seen)))

    def turncoat(self, where: np.ndarray) -> np.ndarray:
        """Builds up trust by clear answers while it wins, and turns them round when it has lost."""
        seen = self._seen()
        last = float(seen[-1]) if len(seen) else 1.0
        noise = self.rng.normal(size=(len(where), CLASSES))
        return last * 5 * self.natural[where[:, 0], where[:, 1]] + noise * (0.1 if last > 0 else 5)

    def _seen(self) -> np.ndarray:
        found = []
        for part in self.reading._parts:
            found += part.questions.bits.numpy()[~part._open].tolist()
        return np.array(found)


KINDS = ("innocent", "wild", "sure", "follower", "turncoat")


def one(kind: str, seed: int) -> float:
    """The greatest e-value, as log10, of one run."""
    rng = np.random.default_rng([seed, KINDS.index(kind)])
    suspect = Suspect(kind, rng)
    reading = Sequential(CallableSuspect(suspect, name=kind), parts(rng), CLASSES)
    suspect.reading = reading
    return reading.run(99.0, 10_000).log10_best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=2000, help="of each suspect")
    parser.add_argument("--out", type=Path, default=OUT)
    given = parser.parse_args()
    torch.set_num_threads(1)
    given.out.parent.mkdir(parents=True, exist_ok=True)
    partial = given.out.with_suffix(".partial")
    best = json.loads(partial.read_text()) if partial.exists() else {kind: [] for kind in KINDS}
    for kind in KINDS:
        while len(best[kind]) < given.runs:
            best[kind].append(round(one(kind, len(best[kind])), 4))
            if len(best[kind]) % 200 == 0:
                partial.write_text(json.dumps(best))
                print(kind, len(best[kind]), flush=True)
    rows = []
    for kind, found in [*best.items(), ("all", [e for values in best.values() for e in values])]:
        counts = {a: int((np.array(found) >= -np.log10(a)).sum()) for a in ALPHAS}
        intervals = {str(a): [c / len(found), *wilson_interval(c, len(found))] for a, c in counts.items()}
        rows.append({"suspect": kind, "runs": len(found), "rate": intervals, "largest": max(found)})
    given.out.write_text(json.dumps({"rows": rows}, indent=1) + "\n")
    partial.unlink(missing_ok=True)


if __name__ == "__main__":
    main()
