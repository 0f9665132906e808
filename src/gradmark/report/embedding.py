"""The report of an embedding: did the model take the mark, and what did that cost?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from gradmark.protocols import Verdict
from gradmark.report.model import Report, Section, Table
from gradmark.report.plots import training
from gradmark.report.verdict import TONES, numbers, pictures
from gradmark.report.words import by_chance, duration, percent, versions

Rows = Sequence[Mapping[str, Any]]


def embed_report(info: Mapping[str, Any], verdict: Verdict, history: Rows, control_history: Rows) -> Report:
    """What embedding did, from the numbers it kept.

    ``info`` holds ``owner``, ``scheme``, ``parameters`` (a dictionary, all public), ``accuracy`` ({"marked":
    (value, low, high), "control": the same or None}, shares from 0 to 1), ``epochs``, ``seed``, ``seconds``,
    ``budget`` (points of accuracy), ``target_log10_p`` and perhaps ``options`` (what else the command
    line was given).
    """
    reached = verdict.outcome == "owned" and verdict.log10_p <= info["target_log10_p"]
    return Report(
        title=f"A mark for {info['owner']}",
        question=f"Did the model take the mark of {info['owner']}, and what did it cost?",
        answer=_answer(info, verdict, reached),
        tone=TONES[verdict.outcome],
        sections=(
            _accuracy(info),
            _training(info, history, control_history),
            *_mark(verdict),
            _settings(info),
            _next(),
        ),
        footer=versions(verdict.version),
    )


def _answer(info: Mapping[str, Any], verdict: Verdict, reached: bool) -> str:
    aim, got = f"log10 p {info['target_log10_p']:g}", f"log10 p is {verdict.log10_p:.1f}"
    if reached:
        first = f"Yes: {got}, which reaches the aim of {aim}."
    elif verdict.outcome == "owned":
        first = f"In part: {got}; the mark is found, but falls short of the aim of {aim}."
    else:
        first = f"No: {got}, and the mark can't be proven. The aim was {aim}."
    first += f" {by_chance(verdict.log10_p)}"
    cost = _cost(info)
    if cost is None:
        return f"{first} Without a control, its cost in accuracy isn't known."
    how = f"{abs(cost):.1f} points {'lower' if cost >= 0 else 'higher'}"
    within = f"{'within' if cost <= info['budget'] else 'over'} the budget of {info['budget']:g} points"
    return f"{first} Accuracy, as measured, is {how} than that of the control; that is {within}."


def _cost(info: Mapping[str, Any]) -> float | None:
    """Points of accuracy lost against the control; None without one."""
    marked, control = info["accuracy"]["marked"], info["accuracy"].get("control")
    return None if control is None else 100 * (control[0] - marked[0])


def _accuracy(info: Mapping[str, Any]) -> Section:
    named = (("With the mark", "marked"), ("Control: the same training without", "control"))
    found = ((name, info["accuracy"].get(kind)) for name, kind in named)
    rows = tuple(
        (name, percent(a[0]), f"{percent(a[1])} to {percent(a[2])}") for name, a in found if a is not None
    )
    note = (
        "Measured on inputs that weren't trained on. Where the intervals overlap widely, the difference may "
        "be chance: a single pair of trainings can't tell a small cost from none."
    )
    return Section("What it cost", tables=(Table(("Model", "Accuracy", "95% interval"), rows, note),))


def _training(info: Mapping[str, Any], history: Rows, control: Rows) -> Section:
    words = f"The model was trained for {info['epochs']} epochs; it took {duration(info['seconds'])} in all."
    if info["accuracy"].get("control") is not None:
        words += " The control had the same start, data and order, but no mark."
    if not history and not control:
        return Section("Training", (words,))
    words += " The mark's curves are estimates on training inputs; the numbers below come from other inputs."
    return Section("Training", (words,), figures=(training(history, control),))


def _mark(verdict: Verdict) -> tuple[Section, ...]:
    return (numbers(verdict), *pictures(verdict))


def _settings(info: Mapping[str, Any]) -> Section:
    rows = [("Scheme", str(info["scheme"])), ("Epochs", str(info["epochs"])), ("Seed", str(info["seed"]))]
    rows.append(("Aim", f"log10 p of {info['target_log10_p']:g} or below"))
    rows.append(("Budget", f"{info['budget']:g} points of accuracy"))
    parts = info["parameters"].get("parts") or [{"scheme": "", "parameters": info["parameters"]}]
    for part in parts:
        where = f", {part['scheme']}" if part["scheme"] else ""
        rows += [(f"Parameter {n}{where}", _shown(n, v)) for n, v in part["parameters"].items()]
    code = (
        "gradmark embed --model MODULE:FACTORY --data DATA --key OWNER.key --out DIR \\\n"
        f"    --scheme {info['scheme']} --budget {info['budget']:g} "
        f"--epochs {info['epochs']} --seed {info['seed']}"
        + "".join(f" \\\n    {option}" for option in info.get("options", ()))
    )
    words = "The same data, key and options on the same machine and versions give the same weights:"
    return Section(
        "How to reproduce this", (words,), (Table(("Setting", "Value"), tuple(rows)),), code=(code,)
    )


def _shown(name: str, value: Any) -> str:
    """A parameter's value; the sealed reference readings are long and tell nothing."""
    return f"sealed, {len(value)} characters" if name == "reference" and value else str(value)


def _next() -> Section:
    return Section(
        "What to do now",
        (
            "Keep the key secret and safe: whoever has it can find and remove the mark, and without it "
            "nothing can be proven.",
            "Publish or time-stamp mark.json before the model leaves the house. It holds a commitment and no "
            "secret; a claim is worth something only if the commitment is older than the suspect.",
            "These numbers are of the model as it was trained. Changes such as fine-tuning, pruning or "
            "coarser numbers may weaken a mark; gradmark verify on a changed copy shows by how much.",
        ),
    )
