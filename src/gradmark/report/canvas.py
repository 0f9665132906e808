"""One way to draw: a matplotlib figure without global state, saved as small, repeatable bytes."""

from __future__ import annotations

import io
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gradmark.errors import UsageError
from gradmark.report.model import Kind

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Drawing

# Okabe and Ito's colours: told apart by colour-blind readers, and in grey.
BLUE, RED, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#6b7280"
CYCLE = (BLUE, RED, GREEN, "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = "osD^vPX"

_LOCK = threading.Lock()  # rc_context changes settings of the whole process for a moment
_STYLE: Any = {
    "axes.axisbelow": True,
    "axes.edgecolor": "#9ca3af",
    "axes.grid": True,
    "axes.labelcolor": "#1f2937",
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 9.5,
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "grid.color": "#e5e7eb",
    "grid.linewidth": 0.7,
    "hatch.linewidth": 0.7,
    "legend.frameon": False,
    "lines.linewidth": 1.7,
    "lines.markersize": 4.5,
    "path.simplify": False,  # every value given is in the file
    "svg.fonttype": "path",
    "svg.hashsalt": "gradmark",  # the same figure gives the same bytes
    "text.parse_math": False,  # names are text, whatever dollars they hold
    "text.usetex": False,
    "xtick.color": "#4b5563",
    "ytick.color": "#4b5563",
}


@dataclass
class Canvas:
    """Axes to draw on; ``data`` is the finished file once the block of :func:`canvas` has ended."""

    drawing: Drawing
    axes: list[list[Axes]]
    data: bytes = b""


@contextmanager
def canvas(
    width: float, height: float, rows: int = 1, columns: int = 1, kind: Kind = "svg"
) -> Iterator[Canvas]:
    """A figure of ``width`` x ``height`` inches with a grid of axes. UsageError without matplotlib."""
    try:
        import matplotlib as mpl
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure as Drawing
    except ImportError as e:
        raise UsageError(
            "Plots need matplotlib",
            found="no such package",
            fix="pip install 'gradmark[report]'",
        ) from e
    with _LOCK, mpl.rc_context(_STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # a name in a script the font lacks
        drawing = Drawing(figsize=(width, height), layout="constrained")
        FigureCanvasAgg(drawing)
        grid = drawing.subplots(rows, columns, squeeze=False)
        result = Canvas(drawing, [list(row) for row in grid])
        yield result
        stream = io.BytesIO()
        metadata = dict.fromkeys(("Date", "Creator")) if kind == "svg" else {"Software": None}
        drawing.savefig(stream, format=kind, dpi=130, metadata=metadata)
        result.data = stream.getvalue()


def named(name: str) -> str:
    """``name`` as a legend shows it: shortened, and visible even if it begins with an underscore."""
    name = name if len(name) <= 40 else name[:39] + "…"
    return " " + name if name.startswith("_") else name


def threshold(axes: Axes, level: float, text: str, *, upright: bool = False) -> None:
    """A dashed line at ``level`` (across y, or x if ``upright``), with its meaning in the legend."""
    line = axes.axvline if upright else axes.axhline
    line(level, color="#111827", linestyle="--", linewidth=1.1, label=text)
