"""The report of ``gradmark demo``: every case in a table, and the pictures that explain it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from gradmark._version import __version__
from gradmark.protocols import Verdict
from gradmark.report import Figure, Report, Section, Table, plots
from gradmark.report.words import odds, percent, versions
from gradmark.verify import DEFAULT_ALPHA

Rows = Sequence[Mapping[str, Any]]
_OUTCOMES = {"owned": "mark found", "no-evidence": "no evidence", "inconclusive": "inconclusive"}


@dataclass(frozen=True)
class Case:
    """One model that was judged. ``attack`` and ``strength``: what was done to it, if anything."""

    name: str
    innocent: bool
    accuracy: float
    verdict: Verdict
    attack: str = ""
    strength: float | None = None


def demo_report(
    cases: Sequence[Case],
    history: Rows,
    control_history: Rows,
    pictures: tuple[Tensor, Tensor],
    settings: Mapping[str, Any],
) -> Report:
    """``pictures``: inputs (m, H, W) and their directions (m, k, H, W); the demo's key is public anyway."""
    good = all((c.verdict.outcome == "owned") is not c.innocent for c in cases if not c.attack)
    owner = cases[0]
    strongest = min((c.verdict.log10_p for c in cases if c.innocent), default=0.0)
    answer = (
        f"{'Yes' if good else 'No'}: for the owner's key, a match like this comes by chance in "
        f"{odds(owner.verdict.log10_p)} models. The strongest evidence that chance gave against an "
        f"innocent one is "
        f"log10 p {strongest:.1f}; the bar is {math.log10(DEFAULT_ALPHA):.0f}."
    )
    return Report(
        title="gradmark demo",
        question="Can a network be signed with its gradients, and told from innocent ones?",
        answer=answer,
        tone="owned" if good else "none",
        sections=(
            _cases(cases),
            _evidence(cases),
            _attacks(cases),
            _inside(history, control_history, pictures),
            _settings(settings),
        ),
        footer=versions(__version__),
    )


def _cases(cases: Sequence[Case]) -> Section:
    rows, marks = [], []
    for c in cases:
        v = c.verdict
        match = f"{v.n_match} of {v.n_bits - v.ties}"
        rows.append(
            (
                c.name,
                "yes" if c.innocent else "no",
                percent(c.accuracy),
                match,
                f"{v.log10_p:.1f}",
                _OUTCOMES[v.outcome],
            )
        )
        marks.append("good" if (v.outcome == "owned") is not c.innocent else "bad")
    words = (
        "A small convolutional network was trained on scikit-learn's 8x8 digits twice from the same "
        "start: once with the "
        "mark and once, as a control, without. Then both, a third network and the marked one after "
        "attacks were judged. "
        "Innocent are the cases where no mark of the key that is asked for was put in."
    )
    head = ("Who is asked", "Innocent", "Accuracy", "Bits that match", "log10 p", "Outcome")
    return Section("Every case", (words,), (Table(head, tuple(rows), mark=tuple(marks)),))  # type: ignore[arg-type]


def _evidence(cases: Sequence[Case]) -> Section:
    curves = {
        c.name: plots.history_curve(c.verdict.reading, c.verdict.test)
        for c in cases
        if c.verdict.access == "black" and c.verdict.reading is not None
    }
    figures: list[Figure] = (
        [plots.readings(cases[0].verdict.reading)] if cases[0].verdict.reading is not None else []
    )
    figures.append(plots.evidence_by_queries(curves, DEFAULT_ALPHA))
    words = (
        "Each bit is read as one number. Times its bit it is positive where the network agrees with "
        "the mark; without "
        "the mark about half of them are. The second picture shows what a bare prediction API gives "
        "away: it was asked "
        "over HTTP and answered with probabilities. Only the end of each line, fixed beforehand, "
        "counts as a verdict."
    )
    return Section("The evidence", (words,), figures=tuple(figures))


def _attacks(cases: Sequence[Case]) -> Section:
    control = next((c.accuracy for c in cases if c.name.startswith("control")), 0.0)
    rows = [{"name": c.name, "accuracy": c.accuracy, "log10_p": c.verdict.log10_p} for c in cases if c.attack]
    pruned = [cases[0], *(c for c in cases if c.attack == "prune")]
    curve = [
        {
            "strength": c.strength or 0.0,
            "accuracy": c.accuracy,
            "match": c.verdict.match,
            "log10_p": c.verdict.log10_p,
        }
        for c in pruned
    ]
    words = "What a thief may try, and what it costs. All of these are read white-box."
    return Section(
        "After attacks",
        (words,),
        figures=(plots.accuracy_against_match(curve), plots.attacks(rows, control, DEFAULT_ALPHA)),
    )


def _inside(history: Rows, control_history: Rows, pictures: tuple[Tensor, Tensor]) -> Section:
    words = (
        "Training with and without the mark, and what the key draws: for each input some directions, in "
        "which the scores of the wrong classes are made to lean. This key is public and worthless; real "
        "directions are secret."
    )
    figures = (plots.training(history, control_history), plots.directions(*pictures))
    return Section("A look inside", (words,), figures=figures)


def _settings(settings: Mapping[str, Any]) -> Section:
    rows = [
        (f"{group}: {name}", str(value))
        for group, values in settings.items()
        for name, value in values.items()
    ]
    table = Table(("Setting", "Value"), tuple(rows))
    return Section("Settings", tables=(table,), code=("gradmark demo",))
