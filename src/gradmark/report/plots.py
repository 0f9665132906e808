"""The pictures of reports. Each function returns a finished :class:`Figure`; none shows a key's secret."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from gradmark.errors import UsageError
from gradmark.protocols import JudgedBy, Reading
from gradmark.report.canvas import BLUE, CYCLE, GREY, MARKERS, RED, canvas, named, threshold
from gradmark.report.model import Figure
from gradmark.report.words import level
from gradmark.stats import bonferroni, ks_uniform, run_tests

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Row = Mapping[str, Any]
EVIDENCE = "log10 p (lower = stronger evidence)"
_PANELS = {
    "task_loss": "Loss of the task itself",
    "accuracy": "Accuracy in training (%)",
    "match": "Bits that match, on training inputs (%)",
    "log10_p": "log10 p, estimated on training inputs",
}

_SHARES = ("accuracy", "match")


def readings(reading: Reading) -> Figure:
    """Reading times bit of every bit, largest first: the order tells nothing about which bit is which."""
    products = np.sort(_numbers(reading.values * reading.bits))[::-1]
    n, n_match = len(products), int((products > 0).sum())
    if not n:
        raise UsageError("There are no readings to draw", expected="one or more")
    with canvas(7.2, 3.1) as c:
        axes = c.axes[0][0]
        for start, stop, colour, hatch, text in (
            (0, n_match, BLUE, "", f"{n_match} agree with the bit"),
            (n_match, n, RED, "////", f"{n - n_match} don't"),
        ):
            if stop > start:
                style: dict[str, Any] = {"facecolor": colour, "edgecolor": "white", "hatch": hatch}
                edges = np.arange(start, stop + 1)
                axes.stairs(
                    products[start:stop], edges, fill=True, linewidth=0, label=text, gid=f"r{start}", **style
                )
        axes.axhline(0, color="#111827", linewidth=1)
        axes.set(xlim=(0, n), xlabel="bits, sorted by their reading", ylabel="reading × bit (logits)")
        axes.legend(loc="upper right")
    alt = (
        f"Bars of {n} readings, sorted. {n_match} are above zero and so agree with the bit, {n - n_match} "
        f"aren't. They range from {products[-1]:.3g} to {products[0]:.3g} logits, median "
        f"{np.median(products):.3g}."
    )
    return Figure("Every reading, sorted; above zero it agrees with the bit", alt, c.data, "svg")


def history_curve(reading: Reading, test: JudgedBy, keys_tried: int = 1) -> list[tuple[int, float]]:
    """(queries, log10 p) for each entry of the reading's history, by the judge's own test of all parts.

    p is corrected for ``keys_tried``, so that the curve ends where the verdict stands.
    """
    if test == "betting":  # it has a curve of its own
        return []
    steps = sorted(reading.history, key=lambda step: step[0])
    if steps:  # the last entry may be of other shares of the queries than the verdict's
        steps = [*(step for step in steps if step[0] < reading.queries), (reading.queries, reading.values)]
    bits = _numbers(reading.bits)
    found = ((q, run_tests(test, _numbers(v) * bits, reading.parts).log10_p) for q, v in steps)
    return [(q, bonferroni(log10_p, keys_tried)) for q, log10_p in found]


def evidence_by_queries(curves: Mapping[str, Sequence[tuple[int, float]]], alpha: float) -> Figure:
    """log10 p against the number of queries, a line for each named curve, and the line of ``alpha``."""
    with canvas(7.2, 3.4) as c:
        axes = c.axes[0][0]
        for i, (name, curve) in enumerate(curves.items()):
            _line(axes, [q for q, _ in curve], [p for _, p in curve], i, name, f"curve-{i}")
        threshold(axes, math.log10(alpha), f"threshold, p = {level(alpha)}")
        axes.set(xlabel="single inputs sent to the model (queries)", ylabel=EVIDENCE)
        _from_zero(axes)
        axes.legend(loc="best")
    ends = "; ".join(f"{name}: {c[-1][1]:.1f} after {c[-1][0]} queries" for name, c in curves.items() if c)
    alt = f"log10 p against queries, threshold {math.log10(alpha):.1f}. {ends}."
    return Figure("Evidence against the number of queries", alt, c.data, "svg")


def accuracy_against_match(rows: Iterable[Row], alpha: float) -> Figure:
    """Accuracy and matching bits against the pruned fraction, and log10 p below; rows hold ``strength``,
    ``accuracy`` and ``match`` (all from 0 to 1) and ``log10_p``."""
    rows = sorted(rows, key=lambda row: float(row["strength"]))
    pruned = [100 * float(row["strength"]) for row in rows]
    with canvas(7.2, 4.6, rows=2) as c:
        upper, lower = c.axes[0][0], c.axes[1][0]
        _line(upper, pruned, _column(rows, "accuracy", 100), 1, "accuracy", "accuracy")
        _line(upper, pruned, _column(rows, "match", 100), 0, "bits that match", "match")
        upper.axhline(50, color=GREY, linewidth=1, linestyle=":", label="chance, for the bits")
        upper.set(ylabel="%", ylim=(-2, 104))
        upper.legend(loc="lower left")
        _line(lower, pruned, _column(rows, "log10_p"), 2, "", "evidence")
        threshold(lower, math.log10(alpha), f"threshold, p = {level(alpha)}")
        _from_zero(lower)
        lower.legend(loc="best")
        lower.set(xlabel="weights removed (%)", ylabel="log10 p\n(lower = stronger)")
    cells = [f"{s:g}% removed: accuracy {_percent(r['accuracy'])}, match {_percent(r['match'])}, "
             f"log10 p {_short(r['log10_p'])}" for s, r in zip(pruned, rows, strict=True)]  # fmt: skip
    return Figure(
        "What pruning costs the thief, and what it does to the mark", _sentences(cells), c.data, "svg"
    )


def attacks(rows: Iterable[Row], control_accuracy: float, alpha: float) -> Figure:
    """One line per attack (``name``, ``accuracy``, ``log10_p``): what is left of use, and of the mark."""
    rows = list(rows)
    names, place = [named(str(row["name"])) for row in rows], list(range(len(rows)))
    with canvas(7.2, 1.5 + 0.27 * len(rows), columns=2) as c:
        left, right = c.axes[0]
        accuracy, evidence = _column(rows, "accuracy", 100), _column(rows, "log10_p")
        found = evidence <= math.log10(alpha)
        left.scatter(accuracy, place, color=GREY, s=26, zorder=3, gid="attack-accuracy")
        threshold(left, 100 * control_accuracy, "unmarked control", upright=True)
        left.set(xlabel="accuracy after the attack (%)", yticks=place, yticklabels=names)
        for mask, colour, marker, text in ((found, BLUE, "o", "mark found"), (~found, RED, "X", "not found")):
            chosen = np.flatnonzero(mask)
            if len(chosen):
                style: dict[str, Any] = {"color": colour, "marker": marker, "s": 32, "zorder": 3}
                right.scatter(
                    evidence[chosen], chosen, label=text, gid=f"attack-{text.replace(' ', '-')}", **style
                )
        threshold(right, math.log10(alpha), f"p = {level(alpha)}", upright=True)
        right.set(xlabel=EVIDENCE, yticks=place, yticklabels=[])
        for axes in (left, right):
            axes.set_ylim(len(rows) - 0.4, -0.6)
            axes.margins(x=0.08)
            axes.legend(
                loc="lower left", bbox_to_anchor=(0, 1), ncols=3, borderaxespad=0.1, handletextpad=0.3
            )
    cells = [f"{r['name']}: accuracy {_percent(r['accuracy'])}, log10 p {_short(r['log10_p'])}" for r in rows]
    return Figure(
        "What each attack leaves of the model's use, and of the mark", _sentences(cells), c.data, "svg"
    )


def directions(inputs: ArrayLike, directions: ArrayLike) -> Figure:
    """Inputs (m, *shape), their directions (m, k, *shape), and the input moved along the first of them.

    The nudge is as large as the direction is given, and cut to the inputs' range. For a throw-away key
    only: directions are part of the secret. Grey or colour images (H, W), (C, H, W) as such; (length,) and
    (C, length) as lines.
    """
    x, d = _numbers(inputs), _numbers(directions)
    if x.ndim < 2 or not len(x) or d.ndim != x.ndim + 1 or d.shape[2:] != x.shape[1:] or len(d) != len(x):
        expected = "inputs (m, *shape), directions (m, k, *shape)"
        raise UsageError(
            "The directions don't fit the inputs", expected=expected, found=f"{x.shape}, {d.shape}"
        )
    limits = (float(x.min()), float(x.max()))
    moved = np.clip(x + d[:, 0], *limits)
    m, k = d.shape[:2]
    size = 1.35 if x.ndim > 3 or _is_grey(x) else 1.9
    with canvas(size * (k + 2) + 0.3, size * 0.95 * m + 0.4, m, k + 2, "png") as c:
        for i, row in enumerate(c.axes):
            for j, (axes, picture) in enumerate(zip(row, [x[i], *d[i], moved[i]], strict=True)):
                own = float(np.abs(picture).max()) or 1.0
                _picture(axes, picture, (-own, own) if 0 < j <= k else limits, signed=0 < j <= k)
                if i == 0:
                    title = "input" if j == 0 else f"direction {j}" if j <= k else "input, nudged"
                    axes.set_title(title, loc="center", fontsize=9)
    alt = (
        f"{m} inputs, each with {k} secret directions in red (lower) and blue (higher), or as lines, and the "
        "input moved along the first direction, as far as a query moves it."
    )
    return Figure("Inputs, the directions the key draws for them, and the nudge", alt, c.data, "png")


def training(history: Sequence[Row], control: Sequence[Row] = ()) -> Figure:
    """Loss, accuracy, matching bits and evidence against steps, for the marked model and its control."""
    shown = [field for field in _PANELS if any(field in row for row in (*history, *control))]
    if not shown:
        raise UsageError("There is no training to draw", expected=", ".join(_PANELS))
    n_rows = (len(shown) + 1) // 2
    with canvas(7.2, 2.3 * n_rows + 0.3, n_rows, 2) as c:
        cells = [axes for row in c.axes for axes in row]
        for axes, field in zip(cells, shown, strict=False):
            for i, (name, rows) in enumerate((("marked", history), ("control", control))):
                kept = [row for row in rows if row.get(field) is not None]
                if kept:
                    scale = 100 if field in _SHARES else 1
                    steps = [int(row["step"]) for row in kept]
                    _line(axes, steps, _column(kept, field, scale), i, name, f"training-{field}-{name}")
            axes.set_title(_PANELS[field])
            axes.legend(loc="best")
        for axes in cells[len(shown) :]:
            axes.set_axis_off()
        for axes in c.axes[-1]:
            axes.set_xlabel("training step")
    ends = [
        f"{_PANELS[f]}: {_short(100 * history[-1][f] if f in _SHARES else history[-1][f])} at the end"
        for f in shown
        if history and history[-1].get(f) is not None
    ]
    return Figure("Training with the mark, and the same training without", _sentences(ends), c.data, "svg")


def innocent_uniformity(p_values: ArrayLike) -> Figure:
    """Shares of innocent models with a p-value up to x, against the diagonal that an honest test follows."""
    p = np.sort(_numbers(p_values))
    distance, ks_p = ks_uniform(p)
    with canvas(4.2, 3.6) as c:
        axes = c.axes[0][0]
        axes.plot([0, 1], [0, 1], color="#111827", linestyle="--", linewidth=1.1, label="an honest test")
        steps = np.arange(1, len(p) + 1) / len(p)
        axes.step(p, steps, where="post", color=BLUE, label=f"{len(p)} innocent cases", gid="innocent")
        axes.set(xlim=(0, 1), ylim=(0, 1.01), xlabel="p-value", ylabel="share with at most this p-value")
        axes.legend(loc="upper left")
    alt = (
        f"Distribution of {len(p)} p-values of models without the mark: from {p[0]:.3g} to {p[-1]:.3g}, at "
        f"most {distance:.3f} away from the diagonal (Kolmogorov-Smirnov test of uniformity: p = {ks_p:.2g})."
    )
    return Figure("p-values of models without the mark", alt, c.data, "svg")


def _picture(axes: Axes, values: NDArray[np.float64], limits: tuple[float, float], *, signed: bool) -> None:
    """One image or set of lines; ``signed`` values get a diverging map with zero in its middle."""
    axes.grid(False)
    axes.set(xticks=[], yticks=[])
    if _is_grey(values[None]) or values.ndim > 2:
        if values.ndim > 2 and values.shape[0] == 3 and not signed:
            low, high = limits
            image = np.clip((np.moveaxis(values, 0, -1) - low) / ((high - low) or 1.0), 0, 1)
        else:
            image = values.reshape(-1, *values.shape[-2:]).mean(axis=0)
        axes.imshow(image, cmap="RdBu" if signed else "gray", vmin=limits[0], vmax=limits[1])
        return
    for i, line in enumerate(np.atleast_2d(values)):
        axes.plot(line, color=CYCLE[(i + signed) % len(CYCLE)], linewidth=0.9)
    axes.set_ylim(limits[0] - 0.05 * (limits[1] - limits[0]), limits[1] + 0.05 * (limits[1] - limits[0]))


def _is_grey(batch: NDArray[np.float64]) -> bool:
    """Whether (m, H, W) holds images without channels; (m, C, length) with few channels holds signals."""
    return batch.ndim == 3 and batch.shape[1] > 4


def _from_zero(axes: Axes) -> None:
    """All the way from no evidence, so that no difference looks larger than it is."""
    low = min(axes.get_ylim()[0], -1.0)
    axes.set_ylim(1.04 * low, -0.04 * low)


def _line(axes: Axes, x: ArrayLike, y: ArrayLike, i: int, name: str, gid: str) -> None:
    style: dict[str, Any] = {"color": CYCLE[i % len(CYCLE)], "marker": MARKERS[i % len(MARKERS)]}
    axes.plot(_numbers(x), _numbers(y), label=named(name) or None, gid=gid, **style)


def _numbers(values: Any) -> NDArray[np.float64]:
    """Tensors, arrays and lists as float64."""
    values = values.detach().cpu().numpy() if hasattr(values, "detach") else values
    return np.asarray(values, dtype=np.float64)


def _column(rows: Iterable[Row], field: str, scale: float = 1) -> NDArray[np.float64]:
    """A field of every row; NaN, which leaves a gap in the plot, where it is missing."""
    return scale * np.array([math.nan if row.get(field) is None else float(row[field]) for row in rows])


def _percent(value: float | None) -> str:
    return "unknown" if value is None else f"{100 * value:.1f}%"


def _short(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.3g}"


def _sentences(parts: Iterable[str]) -> str:
    return "; ".join(parts) + "."


__all__ = [
    "accuracy_against_match",
    "attacks",
    "directions",
    "evidence_by_queries",
    "history_curve",
    "innocent_uniformity",
    "readings",
    "training",
]
