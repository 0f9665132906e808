"""The part of a report that says on what claim the test rests. Holds no secret."""

from __future__ import annotations

from gradmark._version import __version__
from gradmark.claim import Checked
from gradmark.protocols import Verdict
from gradmark.report.model import Report, RowMark, Section, Table
from gradmark.report.verdict import verdict_report
from gradmark.report.words import level, probability, versions

_WORDS: dict[bool | None, tuple[str, RowMark]] = {
    True: ("passed", "good"), False: ("failed", "bad"), None: ("unknown", "plain")
}  # fmt: skip


def ruling_report(
    found: Checked, verdict: Verdict | None, *, ruling: str, reason: str, suspect_name: str, data_name: str,
    parts: tuple[str, ...], innocents: tuple[tuple[str, float], ...], own_data: bool, options: str,
) -> Report:  # fmt: skip
    """The page of a ruling, refused claims included. ``verdict``: None where the suspect wasn't read.

    ``ruling``: in a word. ``options``: what else the command was given, for the reader who repeats it.
    """
    owner = found.file.claim.owner
    again = _again(options)
    section = claim_section(found, innocents, own_data=own_data, opened=found.valid)
    if verdict is not None:
        return verdict_report(
            verdict, owner=owner, suspect_name=suspect_name, data_name=data_name, claim=section, parts=parts,
            again=again, label=ruling,
        )  # fmt: skip
    return Report(
        title=f"Whose model is {suspect_name}?",
        question=f"Is it proven that {suspect_name} carries the mark of {owner}?",
        answer=f"The claim was refused, and {suspect_name} wasn't read: {reason} This counts neither for nor "
        "against whoever has the model.",
        tone="inconclusive",
        sections=(section, again),
        footer=versions(__version__),
        label=ruling,
    )


def _again(options: str) -> Section:
    texts = (
        f"Install gradmark {__version__}, put the real files in place of the names in capital letters, and "
        "run the command below. Everything else is fixed by the claim. The ruling must be the same, and "
        "log10 p up to rounding where another processor computes.",
        "The opening holds the disclosed key: whoever has it can read and remove every mark of that key.",
    )
    command = "gradmark judge SUSPECT --claim CLAIM.json --opening OPENING.json \\\n    --data DATA"
    return Section("How to reproduce this", texts, code=(f"{command}{options} --report again.html",))


def claim_section(
    found: Checked, innocents: tuple[tuple[str, float], ...], *, own_data: bool, opened: bool = True
) -> Section:
    """Owner, dates, what was fixed beforehand, every check, and how innocent models fared."""
    claim = found.file.claim
    rows = tuple((check.name, _WORDS[check.ok][0], check.found) for check in found.checks)
    marks = tuple(_WORDS[check.ok][1] for check in found.checks)
    tables = [Table(("Check", "Result", "What it says"), rows, mark=marks)]
    if innocents:
        others = tuple((name, probability(p)) for name, p in innocents)
        note = "The same test, with the same key and inputs. A small p here would discredit the test."
        tables.append(Table(("Model that can't carry the mark", "p-value"), others, note=note))
    dated = (
        f"A time stamp authority vouches that the claim existed on {found.attested:%Y-%m-%d at %H:%M:%S} UTC."
        if found.attested is not None
        else "Nothing that was given shows when the claim was made; only the owner says so."
    )
    fixed = claim.rule.pool
    inputs = (
        "The inputs were chosen by whoever judged, without the parties."
        if own_data or fixed is None
        else f"The inputs were fixed by the claim: {fixed.inputs} of {fixed.name}, {fixed.digest[:19]}. That "
        "shows that they weren't chosen for this suspect; whether they are ordinary inputs of the task is "
        "for the reader to see."
    )
    controls = (
        ""
        if innocents
        else " No model that can't carry the mark was put to the same test; a judge should ask for one."
    )
    return Section(
        "The claim behind it",
        (
            f"{claim.owner} claimed this mark in a signed statement ({found.file.digest[:19]}), and has now "
            + (
                "disclosed the key. From the key alone the judge's software derived the mark's questions and "
                "bits, after it had seen that the claim commits to this very key, scheme and settings."
                if opened
                else "disclosed a key. The checks below say why that isn't enough."
            ),
            dated,
            f"The claim fixed the threshold at {level(claim.rule.alpha)}: who tries 2⁶⁰ keys for one that "
            "fits by chance gets there with a chance of less than one in a million. The test, the number "
            "of carriers and that of queries were fixed as well.",
            inputs + controls,
        ),
        tables=tuple(tables),
    )
