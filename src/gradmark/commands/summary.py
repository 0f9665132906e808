"""What a terminal shows of a result: a few lines of plain words and a small table."""

from __future__ import annotations

from pathlib import Path

from rich.table import Table

from gradmark.commands.embed import Embedded
from gradmark.protocols import Verdict
from gradmark.report.words import by_chance

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


def verified(verdict: Verdict, suspect: str, report: Path | None) -> list[str]:
    """For ``gradmark verify``."""
    lines = [f"{suspect}: {sentence(verdict)}."]
    if verdict.outcome == "inconclusive":
        lines.append(verdict.reason + ".")
    else:
        lines.append(by_chance(verdict.log10_p, "such arrays" if verdict.scheme == "linear" else "keys"))
    if verdict.scheme == "linear":
        lines.append("This p-value is valid only if the arrays were fixed before the suspect existed.")
    if report is not None:
        lines.append(f"Report: {report}")
    return lines


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
        f"The mark cost {cost:.2f} points of accuracy: {within} the budget of {budget:g}.",
        f"{sentence(done.verdict)}; the aim of {aim:.1f} was {'reached' if reached else 'missed'}.",
        f"Written: {', '.join(done.files.values())}",
    ]
    if not reached:
        lines.append("For a stronger mark: more epochs, a larger --budget, or more --bits.")
    return lines
