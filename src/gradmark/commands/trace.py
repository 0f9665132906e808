"""``gradmark trace``: which licensee's copy is this? From what a user names to an answer and its report."""

from __future__ import annotations

import csv
import io
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from rich.console import Console

from gradmark.codec import MarkFile, atomic_write
from gradmark.commands.progress import Bar, Watched
from gradmark.commands.verify import Endpoint, need_for_reports
from gradmark.data import load_data
from gradmark.errors import MarkFileError, UsageError
from gradmark.keys import OwnerKey
from gradmark.protocols import Access, BlackBox
from gradmark.report import write_report
from gradmark.report.tracing import trace_report
from gradmark.report.words import by_chance
from gradmark.suspects import HttpSuspect, open_suspect
from gradmark.suspects.apis import find_api
from gradmark.trace import Trace, read_licensees, trace
from gradmark.verify import DEFAULT_ALPHA, DEFAULT_QUERIES

CODES = {"named": 0, "no-evidence": 1, "inconclusive": 3}


@dataclass(frozen=True)
class TraceJob:
    """One question: which of ``licensees`` (a file) is in ``suspect``?

    ``tracing``: by default the trace.json beside ``mark``. ``ranking``: a CSV file to write, of every
    licensee's p.
    """

    suspect: str
    licensees: Path
    data: str
    key: OwnerKey
    mark: Path
    tracing: Path | None = None
    model: str | None = None
    access: Access | None = None
    queries: int = DEFAULT_QUERIES
    alpha: float = DEFAULT_ALPHA
    keys_tried: int = 1
    seed: int = 0
    report: Path | None = None
    ranking: Path | None = None
    endpoint: Endpoint = field(default_factory=Endpoint)

    def __post_init__(self) -> None:
        if self.access not in (None, "white", "black"):
            raise UsageError("No such access", expected="white or black", found=repr(self.access))
        if self.report is not None:
            suffix = self.report.suffix.lower()
            if suffix not in (".html", ".pdf") or not self.report.resolve().parent.is_dir():
                raise UsageError(
                    "The report can't be written", expected="*.html or *.pdf in a folder that is there",
                    found=str(self.report),
                )  # fmt: skip
            need_for_reports(pdf=suffix == ".pdf")


def run_trace(job: TraceJob, console: Console) -> Trace:
    """The answer; writes what else was wanted. Progress goes to ``console``."""
    base = MarkFile.load(job.mark)
    base.check_key(job.key)
    tracing = job.tracing or job.mark.parent / "trace.json"
    if not tracing.exists():
        raise MarkFileError(
            "The tracing mark file can't be found", expected=str(tracing), found="no such file",
            fix="gradmark license writes it beside the mark; name another by --trace",
        )  # fmt: skip
    mark = MarkFile.load(tracing)
    licensees = read_licensees(job.licensees)
    data = load_data(job.data)
    suspect = _open(job)
    try:
        with torch.random.fork_rng(devices=[]), Bar(console) as bar:
            torch.manual_seed(job.seed)
            asked = Watched(suspect, bar, job.queries) if isinstance(suspect, HttpSuspect) else suspect
            found = trace(
                mark, base, job.key, asked, data.test.all(), licensees, access=job.access, alpha=job.alpha,
                queries=job.queries, keys_tried=job.keys_tried, told=lambda n, m: bar.move("licensees", n, m),
            )  # fmt: skip
    finally:
        if isinstance(suspect, HttpSuspect):
            suspect.close()
    if job.ranking is not None:
        _write_ranking(job.ranking, found, licensees)
    if job.report is not None:
        report = trace_report(found, owner=job.key.owner, suspect_name=suspect.name, data_name=job.data)
        write_report(report, job.report)
    return found


def traced(found: Trace, suspect: str, report: Path | None) -> list[str]:
    """What a terminal shows."""
    used = found.n_bits - found.ties
    how = f"{found.licensees} licensees, {used} usable bits, {found.access}-box"
    how += f", {found.queries} queries" if found.access == "black" else ""
    if found.outcome == "named":
        lines = [f"{suspect}: LICENSEE NAMED ({how})."]
        lines += [
            f"  {one.licensee}: {round(one.match * used)} of {used} bits match, log10 p = {one.log10_p:.1f}"
            for one in found.named
        ]
        lines.append(by_chance(max(one.log10_p for one in found.named), "lists of licensees"))
        if len(found.named) > 1:
            lines.append("Several copies are in this model: it is a mixture of theirs.")
    else:
        word = "INCONCLUSIVE" if found.outcome == "inconclusive" else "NO EVIDENCE"
        lines = [
            f"{suspect}: {word}, nobody is named ({how}).",
            found.reason[0].upper() + found.reason[1:] + ".",
        ]
    return [*lines, f"Report: {report}"] if report is not None else lines


def _write_ranking(path: Path, found: Trace, licensees: list[str]) -> None:
    """Every licensee's corrected p of the first round, least first. For the owner's eyes: mode 0600."""
    named = {one.licensee for one in found.named}
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(("rank", "licensee", "log10_p", "named"))
    for place, i in enumerate(np.argsort(found.ranking, kind="stable").tolist()):
        rows.writerow((place + 1, licensees[i], f"{found.ranking[i]:.4f}", int(licensees[i] in named)))
    atomic_write(path, text.getvalue().encode(), mode=0o600, overwrite=True)


def _open(job: TraceJob) -> BlackBox:
    if not job.suspect.startswith(("http://", "https://")):
        return open_suspect(job.suspect, model=job.model)
    if job.access == "white":
        raise UsageError("An endpoint can't be read white-box", fix="leave --access out")
    e = job.endpoint
    return HttpSuspect(
        job.suspect, api=find_api(e.api), batch_size=e.batch_size, timeout=e.timeout, journal=e.journal,
        headers=dict(e.headers),
    )  # fmt: skip
