"""Who of many? Every licensee's exact p from one reading, corrected for how many were tried.

An innocent licensee's bits are fair coins that know nothing of the suspect, of the readings or of
any other licensee's bits. So his p is exact whatever the suspect is: also if all others made it
together. With m licensees, round r names those whose p is at most alpha / (m 2^r). What the named ones
explain of the readings is then taken away (least squares) and the next round tests the rest: of several
who averaged their copies, each is noise to the others until he is named. The readings that are
left depend on the named licensees' bits, and never on those of somebody who wasn't named, for whom
they are as fixed as before. Hence the chance that any innocent is ever named is at most
alpha (1/2 + 1/4 + ...) = alpha.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gradmark.protocols import TestName
from gradmark.stats import log10_ps

_MOST_NAMED = 4  # bits there must be for every licensee that is taken away


@dataclass(frozen=True)
class Found:
    """Licensee number ``index``, named in round ``round`` with the corrected ``log10_p``.

    ``match``: part of the usable bits that agreed in that round.
    """

    index: int
    log10_p: float
    round: int
    match: float


@dataclass(frozen=True)
class Ranking:
    """``log10_p`` (m,): the first round's corrected p of every licensee; ``found``: those named, in order."""

    log10_p: NDArray[np.float64]
    found: tuple[Found, ...]


def rank(
    values: NDArray[np.float64],
    signs: NDArray[np.int8],
    *,
    test: TestName,
    alpha: float,
    parts: tuple[int, ...] = (),
    tried: int = 1,
) -> Ranking:
    """Compare readings ``values`` (n,) with the bits ``signs`` (m, n) of m licensees.

    ``parts``: sizes of the readings' parts, tested apart. ``tried``: keys or suspects tried in this search.
    """
    level, found = math.log10(alpha), list[Found]()
    open_ = np.arange(len(signs))
    left, first = values, np.zeros(len(signs))
    for number in range(1, len(signs) + 1):
        price = math.log10(len(signs)) + math.log10(tried) + number * math.log10(2)
        corrected = np.minimum(0.0, log10_ps(test, left, signs[open_], parts) + price)
        if number == 1:
            first = corrected
        fresh = corrected <= level
        for i in sorted(np.flatnonzero(fresh), key=lambda i: float(corrected[i])):
            match = _match(left, signs[open_[i]])
            found.append(Found(int(open_[i]), float(corrected[i]), number, match))
        open_ = open_[~fresh]
        if not fresh.any() or not len(open_) or _MOST_NAMED * len(found) > len(values):
            break
        left = _without(values, signs[[f.index for f in found]], parts)
    return Ranking(first, tuple(found))


def _without(
    values: NDArray[np.float64], named: NDArray[np.int8], parts: tuple[int, ...]
) -> NDArray[np.float64]:
    """``values`` (n,) less what the bits of the named (c, n) explain of each part by least squares."""
    left = values.copy()
    for part in np.split(np.arange(len(values)), np.cumsum(parts)[:-1] if len(parts) > 1 else []):
        used = part[values[part] != 0]
        if len(used) > len(named):
            basis = named[:, used].T.astype(np.float64)
            left[used] -= basis @ np.linalg.lstsq(basis, values[used], rcond=None)[0]
    return left


def _match(values: NDArray[np.float64], signs: NDArray[np.int8]) -> float:
    products = values * signs
    return float((products > 0).sum() / max(1, (products != 0).sum()))
