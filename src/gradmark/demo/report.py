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
from gradmark.report.words import by_chance, level, percent, versions
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
    found = (
        "Yes, in this run: the owner's mark was found with the weights and through an API, and nothing was "
        f"found in any innocent case. {by_chance(owner.verdict.log10_p)}"
        if good
        else "No: not every case came out as it should; the table shows which."
    )
    answer = (
        f"{found} The strongest evidence that chance gave in an innocent case is log10 p {strongest:.1f}; a "
        f"mark counts as found from {math.log10(DEFAULT_ALPHA):.0f} (p = {level(DEFAULT_ALPHA)}) downwards."
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
                _OUTCOMES[v.outcome],
                "yes" if c.innocent else "no",
                f"{v.log10_p:.1f}",
                match,
                percent(c.accuracy),
            )
        )
        marks.append("good" if (v.outcome == "owned") is not c.innocent else "bad")
    words = (
        "A small convolutional network was trained on scikit-learn's 8x8 digits twice from the same "
        "start: once with the mark and once, as a control, without. Then both, a third network, and the "
        "marked one after attacks were judged. A case is innocent if the model was made without the key "
        "that is asked about. White-box means with the weights, black-box by queries alone."
    )
    head = ("Case", "Outcome", "Innocent", "log10 p", "Bits that match", "Accuracy")
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
        "the mark; without the mark about half of them are. The second picture shows what a bare "
        "prediction API gives away: the owner's was asked over HTTP and answered with probabilities. Only "
        "the end of each line, fixed beforehand, counts as a verdict."
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
    words = (
        "Some plain attempts to lose the mark, each read white-box. They bound nothing: more trouble, "
        "such as distillation or long retraining, may achieve more, and whoever has the key can remove the "
        "mark. Accuracy is measured on 600 test inputs, where a point more or less may be chance."
    )
    return Section(
        "After attacks",
        (words,),
        figures=(
            plots.accuracy_against_match(curve, DEFAULT_ALPHA),
            plots.attacks(rows, control, DEFAULT_ALPHA),
        ),
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
    words = "The same command on the same machine and versions gives the same numbers:"
    return Section(
        "Settings", (words,), (table,), code=(f"gradmark demo --seed {settings['recipe']['seed']}",)
    )
