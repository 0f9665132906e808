"""The pictures of a benchmark: evidence against the thief's price, and scheme by attack."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from statistics import median
from typing import TYPE_CHECKING, Any

import numpy as np

from gradmark.errors import UsageError
from gradmark.report.canvas import CYCLE, MARKERS, RED, canvas, named
from gradmark.report.model import Figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Row = Mapping[str, Any]
_FAR = 60.0  # points of utility beyond which a stolen model is worth nothing: the axis ends here


def pareto(rows: Sequence[Row], task: str, *, removed: float, worth: float) -> Figure:
    """One dot per cell: what the thief gave up against what is left of the mark, with the thief's front.

    ``rows`` hold ``scheme``, ``access``, ``stealing_loss`` (points) and ``log10_p``; the lines are at
    ``removed`` and ``worth``. The thief wins in the shaded corner.
    """
    if not rows:
        raise UsageError("There are no cells to draw", expected="one or more")
    schemes = list(dict.fromkeys(str(row["scheme"]) for row in rows))
    with canvas(7.4, 4.6, kind="png") as c:
        axes = c.axes[0][0]
        right = max(*(_loss(r) for r in rows), worth) + 2.5
        for i, scheme in enumerate(schemes):
            of_scheme = [r for r in rows if r["scheme"] == scheme]
            for access, filled in (("white", True), ("black", False)):
                dots = [r for r in of_scheme if r["access"] == access]
                if dots:
                    _dots(axes, dots, i, filled, f"{named(scheme)}, {access}-box")
            front = thiefs_front([(_loss(r), float(r["log10_p"])) for r in of_scheme])
            label = "the thief's front" if i == 0 else None
            x, y = zip(*front, (right, front[-1][1]), strict=True)
            axes.step(x, y, where="post", linewidth=1.1, color=CYCLE[i % len(CYCLE)], label=label)
        low, high = min(float(r["log10_p"]) for r in rows), 3.0
        left = min(*(_loss(r) for r in rows), 0.0) - 1.5
        axes.fill_between([left, worth], removed, high, color=RED, alpha=0.08, linewidth=0)
        axes.axhline(removed, color="#111827", linestyle="--", linewidth=1)
        axes.axvline(worth, color="#111827", linestyle=":", linewidth=1)
        axes.annotate("mark removed", (left, high), (4, -3), textcoords="offset points", va="top",
                      color=RED, fontsize=8.5)  # fmt: skip
        axes.annotate(f"p = 1e{removed:g}", (right, removed), (-3, 3), textcoords="offset points", ha="right",
                      fontsize=8)  # fmt: skip
        axes.annotate(f"{worth:g} points", (worth, low), (3, -2), textcoords="offset points", fontsize=8)
        axes.set(
            xlim=(left, right),
            ylim=(low * 1.05 - 1, high),
            title=f"{task}: every attack, every seed",
            xlabel="utility the thief gives up (points)",
            ylabel="log10 p (lower = stronger evidence)",
        )
        axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1), borderaxespad=0.0, fontsize=8)
    wins = sum(_loss(r) <= worth and float(r["log10_p"]) > removed for r in rows)
    alt = (
        f"{len(rows)} cells of {task}. In {wins} of them the mark is gone (log10 p above {removed:g}) at a "
        f"price of at most {worth:g} points."
    )
    return Figure(f"{task}: what removing the mark costs the thief", alt, c.data, "png")


def thiefs_front(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The best a thief can do: for a growing price, the highest p reached so far."""
    front: list[tuple[float, float]] = []
    for loss, log10_p in sorted(points, key=lambda point: (point[0], -point[1])):
        if not front or log10_p > front[-1][1]:
            front.append((loss, log10_p))
    return front


def heatmap(rows: Sequence[Row], task: str, *, removed: float, worth: float) -> Figure:
    """Median log10 p over seeds for every attack (down) and scheme and access (across), red where too weak.

    A cross marks where the mark is gone at a price of at most ``worth`` points.
    """
    if not rows:
        raise UsageError("There are no cells to draw", expected="one or more")
    attacks = list(dict.fromkeys(str(row["attack"]) for row in rows))
    schemes = list(dict.fromkeys(str(row["scheme"]) for row in rows))
    pairs = {(str(row["scheme"]), str(row["access"])) for row in rows}
    columns = sorted(pairs, key=lambda pair: (pair[1] != "white", pair[1], schemes.index(pair[0])))
    values, losses = np.full((len(attacks), len(columns)), np.nan), np.zeros((len(attacks), len(columns)))
    cells: dict[tuple[str, str, str], list[Row]] = defaultdict(list)
    for row in rows:
        cells[str(row["attack"]), str(row["scheme"]), str(row["access"])].append(row)
    for i, attack in enumerate(attacks):
        for j, (scheme, access) in enumerate(columns):
            if chosen := cells.get((attack, scheme, access)):
                values[i, j] = median(float(r["log10_p"]) for r in chosen)
                losses[i, j] = median(float(r["stealing_loss"]) for r in chosen)
    with canvas(3.4 + 0.75 * len(columns), 1.9 + 0.21 * len(attacks), kind="png") as c:
        axes = c.axes[0][0]
        axes.grid(False)
        axes.set_facecolor("#d1d5db")  # grey: nothing to read that way
        # white at the threshold; what lies far below it is as good as any
        away = removed - values
        shown = np.clip(np.where(away < 0, away / 8, away / 25), -0.75, 0.9)
        axes.imshow(shown, cmap="RdBu", vmin=-1, vmax=1, aspect="auto")
        for (i, j), value in np.ndenumerate(values):
            if not math.isnan(value):
                gone = value > removed and losses[i, j] <= worth
                text = f"{value:.1f}" + (" ×" if gone else "")
                axes.text(j, i, text, ha="center", va="center", fontsize=7.5,
                          color="white" if abs(shown[i, j]) > 0.6 else "#111827",
                          fontweight="bold" if gone else "normal")  # fmt: skip
        axes.set(yticks=range(len(attacks)), yticklabels=[named(a) for a in attacks],
                 xticks=range(len(columns)))  # fmt: skip
        axes.set_xticklabels([f"{named(s)}\n{a}-box" for s, a in columns], rotation=40, ha="left",
                             rotation_mode="anchor", fontsize=8)  # fmt: skip
        axes.tick_params(top=True, bottom=False, labeltop=True, labelbottom=False, length=0, labelsize=8)
        for spine in axes.spines.values():
            spine.set_visible(False)
        axes.set_xlabel(f"{task}: median log10 p. Red: above {removed:g}. ×: for at most {worth:g} points",
                        fontsize=8)  # fmt: skip
    alt = f"Median log10 p of {len(attacks)} attacks on {len(columns)} readings of {task}."
    return Figure(f"{task}: evidence left by every attack", alt, c.data, "png")


def _dots(axes: Axes, rows: Sequence[Row], i: int, filled: bool, label: str) -> None:
    colour = CYCLE[i % len(CYCLE)]
    style: dict[str, Any] = {
        "s": 26,
        "zorder": 3,
        "marker": MARKERS[i % len(MARKERS)],
        "edgecolors": colour,
        "facecolors": colour if filled else "none",
        "alpha": 0.75,
        "linewidths": 1.0,
    }
    axes.scatter([_loss(row) for row in rows], [float(row["log10_p"]) for row in rows], label=label, **style)


def _loss(row: Row) -> float:
    return min(float(row["stealing_loss"]), _FAR)
