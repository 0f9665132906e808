"""What a terminal shows of a result: a few lines of plain words and a small table."""

from __future__ import annotations

from pathlib import Path

from rich.table import Table

from gradmark.commands.embed import Embedded
from gradmark.protocols import Verdict
from gradmark.report.seal import TENSOR_HEAD, answer, tensor_row
from gradmark.report.words import PROGRAM, by_chance
from gradmark.seal import Checked, SealFile

WORDS = {"owned": "MARK FOUND", "no-evidence": "NO EVIDENCE", "inconclusive": "INCONCLUSIVE"}


def sentence(verdict: Verdict) -> str:
    """The verdict in one line."""
    used = max(verdict.n_bits - verdict.ties, 0)
    asked = f", {verdict.queries} queries" if verdict.access == "black" else ""
    won = "" if verdict.log10_e is None else f"log10 e = {verdict.log10_e:.1f}, "
    told = (
        f"{WORDS[verdict.outcome]}: {verdict.n_match} of {used} bits match, "
        f"{won}log10 p = {verdict.log10_p:.1f}"
    )
    return f"{told} ({verdict.access}-box{asked})"


def whose(verdict: Verdict) -> str:
    """Mark and seal together in words: ours untouched, ours modified, not ours, or inconclusive."""
    if verdict.outcome == "inconclusive":
        return "INCONCLUSIVE: whose it is couldn't be told."
    if verdict.outcome == "no-evidence":
        if verdict.modified is False:
            return "The sealed model, untouched, but without evidence of this mark."
        return "NOT OURS, as far as mark and seal can tell."
    if verdict.modified is None:
        return "OURS; whether it was modified couldn't be told."
    if verdict.modified:
        return "OURS, MODIFIED since it was sealed."
    if verdict.own_program:
        return f"OURS, WEIGHTS UNTOUCHED since it was sealed. {PROGRAM}"
    return "OURS, UNTOUCHED since it was sealed."


def from_journal(verdict: Verdict) -> str:
    """Where answers come from that weren't asked for now."""
    return f"{verdict.reused} of the answers were kept from an earlier run, and not asked for again."


def verified(verdict: Verdict, suspect: str, report: Path | None, seal: Path | None = None) -> list[str]:
    """For ``gradmark verify``."""
    lines = [f"{suspect}: {sentence(verdict)}."]
    if seal is not None:
        lines.append(whose(verdict))
    if verdict.outcome == "inconclusive":
        lines.append(verdict.reason + ".")
    else:
        lines.append(by_chance(verdict.log10_p, "such arrays" if verdict.scheme == "linear" else "keys"))
    if verdict.reused:
        lines.append(from_journal(verdict))
    if verdict.scheme == "linear":
        lines.append("This p-value is valid only if the arrays were fixed before the suspect existed.")
    if report is not None:
        lines.append(f"Report: {report}")
    return lines


def sealed(seal: SealFile, out: Path) -> list[Table | str]:
    """For ``gradmark seal``."""
    lines: list[Table | str] = [f"Sealed {len(seal.tensors)} tensors of {seal.model[:19]}… in {out}."]
    if seal.probes is None:
        return [*lines, "It has no probes: it can be published, and checks files with weights alone."]
    table = Table("Answers show", "noise seen on any one weight tensor", title_justify="left")
    for shown, limit in seal.limits().items():
        table.add_row(shown, "not on all of them" if limit is None else f"{100 * limit:.2g} % of its size")
    lines += [f"{len(seal.probes.x)} probes, which tell a changed model by its answers:", table]
    return [
        *lines,
        f"Signed by {seal.signer}. Keep the seal private: who has the probes can train to pass them.",
    ]


def checked(found: Checked, suspect: str, report: Path | None) -> list[Table | str]:
    """For ``gradmark check``."""
    words = {
        "intact": "INTACT",
        "modified": "MODIFIED",
        "other": "ANOTHER MODEL",
        "inconclusive": "INCONCLUSIVE",
    }
    said = words[found.outcome]
    if found.outcome == "intact" and found.own_program:
        said += " WEIGHTS"
    lines: list[Table | str] = [f"{suspect}: {said} ({found.access}-box, {found.queries} queries)."]
    lines.append(answer(found, suspect))
    if found.outcome == "intact" and found.access == "black" and found.limit is not None:
        lines.append(f"Noise of {100 * found.limit:.2g} % on any one weight tensor would have shown.")
    if found.tensors:
        table = Table(*TENSOR_HEAD, title_justify="left")
        for i in range(min(10, len(found.tensors))):
            table.add_row(*tensor_row(found, i))
        lines.append(table)
        if len(found.tensors) > 10:
            lines.append(f"... and {len(found.tensors) - 10} more: --json lists all.")
    return [*lines, f"Report: {report}"] if report is not None else lines


def embedded(done: Embedded) -> list[Table | str]:
    """For ``gradmark embed``."""
    table = Table("Model", "Accuracy", "95% interval", title_justify="left")
    for name, (value, low, high) in done.run["accuracy"].items():
        table.add_row(name, f"{100 * value:.2f}%", f"{100 * low:.2f}% to {100 * high:.2f}%")
    cost, budget = done.run["cost_points"], done.run["budget"]
    within = "within" if done.run["within_budget"] else "OVER"
    aim = done.run["target_log10_p"]
    reached = done.verdict.log10_p <= aim
    lines: list[Table | str] = [
        table,
        f"The mark cost {cost:.2f} points of accuracy: {within} the budget of {budget:g}."
        if cost > 0
        else f"The mark cost no accuracy here ({-cost:+.2f} points).",
        f"{sentence(done.verdict)}; the aim of {aim:.1f} was {'reached' if reached else 'missed'}.",
        f"Written: {', '.join(done.files.values())}",
    ]
    if not reached:
        lines.append("For a stronger mark: more epochs, a larger --budget, or more --bits.")
    return lines
