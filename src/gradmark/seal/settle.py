"""From a near tie to an exact one: gaps of chosen size on the grid that the input format allows.

Where inputs are continuous, Newton's steps of least norm do it. On a grid of steps a lattice problem is left;
a few pixels moved by one step each, chosen greedily and at last in pairs, solve it well enough, since
thousands of pixels offer moves of every size.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from gradmark.protocols import ModelSpec
from gradmark.seal.probes import Ties, within

Score = Callable[[Tensor], Tensor]
_ROUNDS, _MOVES, _PAIRED = 16, 80, 1200


def settle(
    score: Score, exact: Score, x: Tensor, ties: Ties, spec: ModelSpec, low: float, high: float
) -> tuple[Tensor, Tensor]:
    """Inputs (n, *shape) whose gaps all lie in ``low`` to ``high`` logits, and which of them (n,) do.

    ``score`` gives logits (n, C) to differentiate, ``exact`` those that count. Inputs that can't be settled
    are given back with the smallest misfit that was met.
    """
    x = spec.snap(x).clone()
    best, misfit = x.clone(), torch.full((len(x),), torch.inf, dtype=torch.float64)
    rows = torch.arange(len(x))
    for _ in range(_ROUNDS):
        with torch.no_grad():
            gaps = ties.at(rows).gaps(exact(x[rows])).double()
        off = torch.maximum(gaps - high, low - gaps).amax(1).clamp_min(0)
        better = off < misfit[rows]
        best[rows[better]], misfit[rows[better]] = x[rows[better]], off[better]
        open_ = misfit[rows] > 0
        rows, gaps = rows[open_], gaps[open_]
        if not len(rows):
            break
        slopes = _slopes(score, x[rows], ties.at(rows))
        for place, i in enumerate(rows.tolist()):
            x[i] = _moved(x[i], slopes[place], (low + high) / 2 - gaps[place], spec)
    return best, misfit == 0


def _slopes(score: Score, x: Tensor, ties: Ties) -> Tensor:
    """Slopes (n, k-1, features) of the gaps, float64."""
    x = x.clone().requires_grad_(True)
    gaps = ties.gaps(score(x))
    slopes = [torch.autograd.grad(gaps[:, j].sum(), x, retain_graph=True)[0] for j in range(gaps.shape[1])]
    return torch.stack(slopes, 1).flatten(2).double()


def _moved(x: Tensor, slopes: Tensor, wanted: Tensor, spec: ModelSpec) -> Tensor:
    """One input moved so that its gaps change by ``wanted`` (k-1,), to first order."""
    flat = x.flatten().double()
    if spec.low is None or spec.high is None or spec.levels is None:
        free = torch.ones_like(flat)
        step = torch.zeros_like(flat)
        for _ in range(3):  # what a bound holds back, the others make up for
            open_slopes = slopes * free
            step = step + torch.linalg.pinv(open_slopes) @ (wanted - slopes @ step)
            step = within(flat + step, spec) - flat
            inside = torch.ones_like(flat, dtype=torch.bool)
            if spec.low is not None:
                inside &= flat + step > spec.low
            if spec.high is not None:
                inside &= flat + step < spec.high
            free = inside.double()
        return (flat + step).float().reshape(x.shape)
    unit = (spec.high - spec.low) / spec.levels
    moves = _on_grid(((flat - spec.low) / unit).round(), slopes * unit, wanted, spec.levels)
    return spec.snap((flat + moves * unit).float()).reshape(x.shape)


def _on_grid(place: Tensor, slopes: Tensor, wanted: Tensor, levels: int) -> Tensor:
    """Whole steps (features,) that change the gaps by about ``wanted``; slopes are per step."""
    moves, left = torch.zeros_like(place), wanted.clone()
    options = torch.cat([slopes, -slopes], 1).T  # one step up or down each (2 features, k-1)
    n = len(place)
    for _ in range(_MOVES):
        at = place + moves
        legal = torch.cat([(at < levels) & (moves < 2), (at > 0) & (moves > -2)])
        after = (left - options).square().sum(1).masked_fill(~legal, torch.inf)
        pick = int(after.argmin())
        if float(after[pick]) >= float(left.square().sum()):
            break
        moves[pick % n] += 1 if pick < n else -1
        left = left - options[pick]
    at = place + moves
    legal = torch.nonzero(torch.cat([(at < levels) & (moves < 2), (at > 0) & (moves > -2)])).flatten()
    near = legal[options[legal].square().sum(1).argsort()[: 4 * _PAIRED]]
    near = near[:: max(1, len(near) // _PAIRED)][:_PAIRED]
    if len(near) > 1:
        distance = torch.cdist(left - options[near], options[near])
        a, b = divmod(int(distance.argmin()), len(near))
        first, second = int(near[a]), int(near[b])
        if first % n != second % n and float(distance[a, b]) < float(left.norm()):
            for pick in (first, second):
                moves[pick % n] += 1 if pick < n else -1
    return moves


__all__ = ["settle"]
