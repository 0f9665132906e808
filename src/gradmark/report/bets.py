"""The picture of a step-by-step reading: what the bets had won, query by query."""

from __future__ import annotations

import math
from collections.abc import Sequence

from gradmark.report.canvas import BLUE, canvas, threshold
from gradmark.report.model import Figure
from gradmark.report.words import level


def bets_by_queries(evidence: Sequence[tuple[int, float]], alpha: float) -> Figure:
    """log10 of the e-value after each number of queries, and the line 1 / ``alpha`` that it has to reach."""
    queries, won = [0, *(q for q, _ in evidence)], [0.0, *(e for _, e in evidence)]
    asked = -math.log10(alpha)
    with canvas(7.2, 3.4) as c:
        axes = c.axes[0][0]
        axes.plot(
            queries, won, color=BLUE, marker="o", drawstyle="steps-post", label="the bets' wealth", gid="e"
        )
        threshold(axes, asked, f"threshold, e = {level(1 / alpha)}")
        axes.axhline(0, color="#111827", linewidth=0.8)
        axes.set(xlabel="single inputs sent to the model (queries)", ylabel="log10 e (higher = stronger)")
        axes.legend(loc="best")
    alt = f"log10 e against queries: {won[-1]:.1f} after {queries[-1]}; {asked:.1f} is asked."
    return Figure("What the bets on the secret bits had won, query by query", alt, c.data, "svg")
