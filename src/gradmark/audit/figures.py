"""The pictures of an audit: the model against its control, every uncertainty drawn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from gradmark.audit.effects import Effect
from gradmark.audit.measure import Detector, percentiles
from gradmark.report.canvas import BLUE, CYCLE, GREY, RED, canvas, named
from gradmark.report.model import Figure
from gradmark.report.plots import directions

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_FEW = 5  # inputs of a bin below which its accuracy says nothing
_SHORT = 26  # letters of a layer's name on an axis


def effects_overview(detectors: Sequence[Detector]) -> Figure:
    """Side-by-side detectors: log ratio over its tolerance, one line each; beyond the band is striking."""
    rows = [d for d in detectors if d.effect is not None and d.part == "gradients"]
    layers = [d for d in detectors if d.effect is not None and d.part == "weights"]
    rows += sorted(layers, key=lambda d: -abs(d.effect or 0) / d.tolerance)[:8]
    sizes = [(d.effect or 0.0) / d.tolerance for d in rows]
    with canvas(7.2, 0.9 + 0.25 * len(rows)) as c:
        axes = c.axes[0][0]
        axes.axvspan(-1, 1, color="#eef2f7", label="as two unmarked trainings may differ")
        axes.axvline(0, color="#111827", linewidth=0.9)
        for i, (d, size) in enumerate(zip(rows, sizes, strict=True)):
            colour = RED if d.striking else BLUE
            axes.plot([0, size], [i, i], color=colour, linewidth=1.4)
            if d.z:  # half a 95 % interval, from the z
                half = 1.96 * abs(size / d.z)
                axes.plot([size - half, size + half], [i, i], color=colour, linewidth=4, alpha=0.35)
            axes.plot(size, i, "X" if d.striking else "o", color=colour)
        _names(axes, [_layer(d.name) if d.part == "weights" else d.name for d in rows])
        axes.set(xlabel="model against control (1: the most that is usual)")
        reach = 1.12 * max(2.0, *(abs(s) for s in sizes))
        axes.set_xlim(-reach, reach)
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1), borderaxespad=0.1)
    alt = "; ".join(f"{d.name}: {s:+.1f}" for d, s in zip(rows, sizes, strict=True))
    return Figure(
        "White-box statistics, model against control (the eight layers' that differ most)", alt, c.data, "svg"
    )


def response_spectrum(spectra: Mapping[str, Tensor]) -> Figure:
    """Singular values of the mean response, both networks, with intervals over inputs."""
    parts = []
    with canvas(7.2, 2.9) as c:
        axes = c.axes[0][0]
        for i, (name, colour) in enumerate((("model", RED), ("control", BLUE))):
            found = [percentiles(v) for v in spectra[name].unbind(1)]
            found = [v for v in found if v.value > 1e-6]  # contrasts that sum to zero leave one empty
            place = np.arange(1, len(found) + 1) + 0.12 * (2 * i - 1)
            value = np.array([v.value for v in found])
            # a resample adds its own noise to small values, so its interval is centred on the value again
            half = [(v.high - v.low) / 2 for v in found]
            axes.errorbar(place, value, half, color=colour, fmt="Xo"[i], label=name, capsize=2, linewidth=1.2)
            parts.append(f"{name}: {', '.join(f'{v:.2g}' for v in value[:5])}")
        axes.set(xlabel="singular value, by size", ylabel="logits per direction", ylim=(0, None))
        axes.legend(loc="upper right")
    return Figure(
        "Spectrum of the mean response to random directions of the scheme's family",
        "; ".join(parts),
        c.data,
        "svg",
    )


def layer_spectra(layers: Mapping[str, tuple[Tensor, Tensor]]) -> Figure:
    """Singular values of the weights, up to six layers."""
    shown = list(layers.items())[:6]
    columns = min(3, len(shown))
    rows = -(-len(shown) // columns)
    with canvas(7.2, 2.0 * rows + 0.2, rows, columns) as c:
        cells = [axes for row in c.axes for axes in row]
        for axes, (name, (ours, theirs)) in zip(cells, shown, strict=False):
            for values, colour, label in ((theirs, BLUE, "control"), (ours, RED, "model")):
                axes.plot(np.arange(1, len(values) + 1), values.numpy(), color=colour, label=label)
            axes.set_title(_layer(name))
            axes.set_ylim(0, None)
        for axes in cells[len(shown) :]:
            axes.set_axis_off()
        cells[0].legend(loc="upper right")
    alt = "; ".join(f"{n}: largest {float(a[0]):.3g}, control {float(b[0]):.3g}" for n, (a, b) in shown)
    return Figure("Singular values of the weights, layer by layer", alt, c.data, "svg")


def probe_distances(near: Mapping[str, NDArray[np.float64]]) -> Figure:
    """Shares of queries within a distance of the nearest input that the API knows."""
    with canvas(7.2, 2.9) as c:
        axes = c.axes[0][0]
        for (name, values), colour, style in zip(
            near.items(), (BLUE, RED, CYCLE[4]), ("-", "-", "--"), strict=True
        ):
            steps = np.sort(values)
            share = np.arange(1, len(steps) + 1) / len(steps)
            axes.step(steps, share, where="post", color=colour, linestyle=style, label=name)
        axes.set(xlabel="distance to the nearest known input (per coordinate)", ylabel="share of queries",
                 ylim=(0, 1.02), xlim=(0, None))  # fmt: skip
        axes.legend(loc="lower right")
    alt = "; ".join(f"{name}: median {np.median(v):.3g}" for name, v in near.items())
    return Figure("Is a probe farther from, or closer to, natural inputs than they are?", alt, c.data, "svg")


def probe_looks(names: Sequence[str], natural: NDArray[np.float64], probes: NDArray[np.float64]) -> Figure:
    """Distributions of single inputs' statistics."""
    columns, rows = 3, -(-len(names) // 3)
    with canvas(7.2, 1.75 * rows + 0.2, rows, columns) as c:
        cells = [axes for row in c.axes for axes in row]
        for i, (axes, name) in enumerate(zip(cells, names, strict=False)):
            both = np.concatenate([natural[:, i], probes[:, i]])
            edges = np.linspace(both.min(), both.max() + 1e-9, 21).tolist()
            for values, colour, label in ((natural, BLUE, "other users"), (probes, RED, "probes")):
                axes.hist(values[:, i], edges, density=True, histtype="stepfilled", alpha=0.25, color=colour)
                axes.hist(values[:, i], edges, density=True, histtype="step", color=colour, label=label)
            axes.set_title(name)
            axes.set_yticks([])
        for axes in cells[len(names) :]:
            axes.set_axis_off()
        cells[0].legend(loc="best", fontsize=7.5)
    alt = "; ".join(
        f"{n}: median {np.median(probes[:, i]):.3g}, other users' {np.median(natural[:, i]):.3g}"
        for i, n in enumerate(names)
    )
    return Figure("How single probes look beside other users' inputs", alt, c.data, "svg")


def probe_examples(carriers: Tensor, asked: Tensor, count: int = 3) -> Figure:
    """Some carriers, how two probes differ from each, and the first probe. Of a throwaway key."""
    distance = (asked.flatten(1)[:, None] - carriers[:count].flatten(1)[None]).square().sum(2)
    two = distance.T.topk(2, largest=False).indices  # (count, 2)
    moved = asked[two] - carriers[:count][:, None]
    picture = directions(carriers[:count], moved)
    return Figure(
        "Carriers of a throwaway key, how two probes differ from each, and the first probe",
        picture.alt, picture.svg_or_png, picture.kind,
    )  # fmt: skip


def harm(effects: Sequence[Effect]) -> Figure:
    """Differences of accuracy in points, with intervals: right of zero the marked model does better."""
    rows = [e for e in effects if e.kind in ("accuracy", "attack", "corruption")]
    with canvas(7.2, 0.8 + 0.215 * len(rows), columns=2) as c:
        left, right = c.axes[0]
        for i, e in enumerate(rows):
            left.plot([100 * e.control, 100 * e.model], [i, i], color="#d1d5db", linewidth=1.4, zorder=1)
            left.plot(100 * e.control, i, "o", color=BLUE, label="control" if i == 0 else None)
            left.plot(100 * e.model, i, "D", color=RED, markersize=3.6, label="model" if i == 0 else None)
            colour = RED if e.worse else GREY
            right.plot([100 * e.low, 100 * e.high], [i, i], color=colour, linewidth=2)
            right.plot(100 * e.difference, i, "X" if e.worse else "o", color=colour)
        right.axvline(0, color="#111827", linewidth=0.9)
        _names(left, [e.name for e in rows])
        _names(right, [""] * len(rows))
        left.set(xlabel="accuracy (%)")
        right.set(xlabel="model minus control (points), 95% interval")
        left.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2, borderaxespad=0.1)
    alt = "; ".join(
        f"{e.name}: {100 * e.difference:+.1f} [{100 * e.low:+.1f}, {100 * e.high:+.1f}]" for e in rows
    )
    return Figure("Accuracy on clean, attacked and spoilt inputs", alt, c.data, "svg")


def trust(confidence: Sequence[Tensor], reliability: Sequence[Sequence[tuple[float, float, int]]]) -> Figure:
    """How sure both are, and how often they are right when so sure."""
    names, colours = ("model", "control"), (RED, BLUE)
    with canvas(7.2, 2.9, columns=2) as c:
        left, right = c.axes[0]
        for values, name, colour in zip(confidence, names, colours, strict=True):
            shares = np.full(len(values), 100 / len(values))
            edges = np.linspace(min(0.2, float(values.min())), 1, 26).tolist()
            left.hist(values.numpy(), edges, weights=shares, histtype="step", color=colour, label=name)
        left.set_ylim(50 / max(map(len, confidence)), 150)  # before the scale, which needs bounds above zero
        left.set(xlabel="confidence", ylabel="share of inputs (%), log scale", yscale="log")
        left.yaxis.set_major_formatter("{x:g}")  # the default is markup, which this style leaves alone
        left.legend(loc="upper left")
        right.plot([0, 1], [0, 1], color="#111827", linestyle="--", linewidth=1)
        for bins, name, colour in zip(reliability, names, colours, strict=True):
            sure, hit, held = np.array([b for b in bins if b[2] >= _FEW] or bins[-1:], dtype=float).T
            right.plot(sure, hit, color=colour, linewidth=1, alpha=0.6)
            right.scatter(sure, hit, 8 + 60 * held / held.max(), color=colour, label=name, zorder=3)
        right.set(xlabel="confidence", ylabel="share that is right", xlim=(0, 1.03), ylim=(0, 1.03))
    means = "; ".join(
        f"{n}: mean confidence {float(v.mean()):.3f}" for n, v in zip(names, confidence, strict=True)
    )
    return Figure(
        f"Confidence, and whether it is deserved, in bins of {_FEW} inputs or more", means, c.data, "svg"
    )


def _names(axes: Axes, names: Sequence[str]) -> None:
    """One line per name, the first on top."""
    axes.set_yticks(range(len(names)), [named(n) for n in names])
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.grid(False, axis="y")


def _layer(name: str) -> str:
    return name if len(name) <= _SHORT + 20 else "…" + name[-_SHORT - 19 :]


def pictures(detectors: Sequence[Detector], curves: Mapping[str, Any]) -> dict[str, tuple[Figure, ...]]:
    """What there is to draw, by section."""
    white = [effects_overview(detectors)] if any(d.access == "white" for d in detectors) else []
    white += [response_spectrum(curves["spectrum"])] if "spectrum" in curves else []
    white += [layer_spectra(curves["layers"])] if curves.get("layers") else []
    if "near" not in curves:
        return {"white": tuple(white), "black": ()}
    black = [probe_distances(curves["near"]), probe_looks(*curves["features"])]
    carriers, asked = curves["examples"]
    if carriers.ndim > 2 and carriers.shape[1] <= 4:
        black.append(probe_examples(carriers, asked))
    return {"white": tuple(white), "black": tuple(black)}
