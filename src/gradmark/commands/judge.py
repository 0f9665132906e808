"""``gradmark judge``: from a claim and its opening to a verdict, with no choice left to anybody."""

from __future__ import annotations

import math
import tempfile
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.table import Table

from gradmark._version import __version__
from gradmark.claim import Checked, ClaimFile, Opening, check_claim, pool_digest
from gradmark.claim.search import TRIES, combined, searchable
from gradmark.claim.timestamp import load_certificates
from gradmark.codec import MarkFile
from gradmark.commands.claim import checked
from gradmark.commands.summary import from_journal, sentence
from gradmark.commands.verify import Endpoint, VerifyJob, parts_of, run_verify
from gradmark.data import load_data
from gradmark.errors import MismatchError, UsageError
from gradmark.protocols import Outcome, Verdict
from gradmark.report import write_report
from gradmark.report.claim import ruling_report
from gradmark.report.model import Report
from gradmark.stats import apart, run_test
from gradmark.suspects import public_name
from gradmark.verify import DEFAULT_ALPHA

Ruling = Literal["owned", "no-evidence", "inconclusive", "refused"]


@dataclass(frozen=True)
class JudgeJob:
    """``opening``: the disclosed key. ``own_data``: the judge chose ``data`` without the parties.

    ``innocents``: models that can't carry the mark; the claim fails if one of them seems to.
    """

    suspect: str
    claim: Path
    opening: Opening
    data: str
    model: str | None = None
    own_data: bool = False
    innocents: tuple[str, ...] = ()
    certificates: Path | None = None
    against: Path | None = None
    report: Path | None = None
    endpoint: Endpoint = field(default_factory=Endpoint)


@dataclass(frozen=True)
class Judged:
    """``outcome``: the verdict's, or ``refused`` with the reason. ``innocents``: names and their log10 p."""

    outcome: Ruling
    reason: str
    claim: Checked
    pool: Literal["claimed", "own"]
    verdict: Verdict | None = None
    innocents: tuple[tuple[str, float], ...] = ()

    def to_json(self) -> dict[str, Any]:
        return {
            "outcome": self.outcome,
            "reason": self.reason,
            "verdict": None if self.verdict is None else self.verdict.to_json(),
            "innocents": [{"model": name, "log10_p": p} for name, p in self.innocents],
            "pool": self.pool,
            "claim": self.claim.to_json(),
            "version": __version__,
        }


def run_judge(job: JudgeJob, console: Console) -> Judged:
    """The ruling; writes ``job.report``, whatever it is. Progress goes to ``console``.

    Raises MismatchError where opening, claim and data don't belong together, UsageError where nobody has
    fixed the data.
    """
    file = ClaimFile.load(job.claim)
    if job.opening.claim != file.digest:
        raise MismatchError(
            "The opening is of another claim", expected=file.digest[:19], found=job.opening.claim[:19]
        )
    trusted = None if job.certificates is None else load_certificates(job.certificates)
    against = None if job.against is None else ClaimFile.load(job.against)
    found = check_claim(file, key=job.opening.key, trusted=trusted, against=against)
    ruling = _ruling(job, file, found, console)
    if job.report is not None:
        write_report(_page(job, file, ruling), job.report)
    return ruling


def _ruling(job: JudgeJob, file: ClaimFile, found: Checked, console: Console) -> Judged:
    pool: Literal["claimed", "own"] = "own" if job.own_data else "claimed"
    if not found.valid:
        failed = " ".join(check.found for check in found.checks if check.ok is False)
        return Judged("refused", failed, found, pool)
    if not job.own_data:
        _same_pool(file, job.data)
    with tempfile.TemporaryDirectory(prefix="gradmark-judge-") as folder:
        mark = Path(folder) / "mark.json"
        file.claim.mark.save(mark)
        innocents = tuple(
            (public_name(one), _verdict(job, one, mark, file, console).log10_p) for one in job.innocents
        )
        limit = math.log10(DEFAULT_ALPHA) - math.log10(max(1, len(innocents)))
        guilty = [name for name, log10_p in innocents if log10_p <= limit]
        if guilty:
            reason = f"The same test accuses {', '.join(guilty)}, which can't carry the mark."
            return Judged("refused", reason, found, pool, None, innocents)
        verdict = _as_searched(_verdict(job, job.suspect, mark, file, console), file.claim.mark)
    return Judged(verdict.outcome, verdict.reason, found, pool, verdict, innocents)


def _page(job: JudgeJob, file: ClaimFile, ruling: Judged) -> Report:
    name = public_name(job.suspect) if "://" in job.suspect else Path(job.suspect).name
    options = f" --model {job.model}" if job.model is not None else ""
    options += " --own-data" if job.own_data else ""
    options += "".join(" --innocent INNOCENT" for _ in job.innocents)
    return ruling_report(
        ruling.claim, ruling.verdict, ruling=WORDS[ruling.outcome].capitalize(), reason=ruling.reason,
        suspect_name=name, data_name=job.data, parts=parts_of(file.claim.mark), innocents=ruling.innocents,
        own_data=job.own_data, options=options,
    )  # fmt: skip


def _same_pool(file: ClaimFile, data: str) -> None:
    """The data are those that the claim fixed, order included."""
    fixed = file.claim.rule.pool
    if fixed is None:
        raise UsageError(
            "The claim leaves the inputs open",
            expected="data that the judge chose without the parties, and --own-data to say so",
            found="no pool in the claim, and no --own-data",
        )
    found = pool_digest(load_data(data).test.all())
    if found != fixed.digest:
        raise MismatchError(
            "These aren't the inputs that the claim fixed",
            expected=f"the {fixed.inputs} inputs of {fixed.name}, {fixed.digest[:19]}",
            found=found[:19],
            fix="Take those, or data that the judge chose without the parties, with --own-data",
        )


def _verdict(job: JudgeJob, suspect: str, mark: Path, file: ClaimFile, console: Console) -> Verdict:
    rule = file.claim.rule
    endpoint = job.endpoint if suspect == job.suspect else Endpoint()
    return run_verify(
        VerifyJob(
            suspect, job.data, job.opening.key, mark, model=job.model, queries=rule.queries, alpha=rule.alpha,
            endpoint=endpoint,
        ),
        console,
    )  # fmt: skip


def _as_searched(found: Verdict, mark: MarkFile) -> Verdict:
    """``found``, with the outcome that is left where parts of the mark can be searched for one by one."""
    reading = found.reading
    if reading is None or not searchable(mark):
        return found
    signed = (reading.values * reading.bits).numpy()
    parts = [run_test(mark.test, part) for part in apart(signed, reading.parts)]
    log10_p = combined([p.log10_p for p in parts if p.n])
    least = combined([-p.n * math.log10(2) for p in parts if p.n])
    level = min(0.0, math.log10(found.alpha) + TRIES)
    outcome: Outcome = "owned" if log10_p <= level else "inconclusive" if least > level else "no-evidence"
    reason = (
        f"a search for each part by itself finds as much with a chance of 10^{log10_p:.1f}; "
        f"the threshold is 10^{level:.1f}"
    )
    return replace(found, outcome=outcome, reason=reason)


WORDS: dict[Ruling, str] = {
    "owned": "PROVEN",
    "no-evidence": "NOT PROVEN",
    "inconclusive": "INCONCLUSIVE",
    "refused": "REFUSED",
}
CODES: dict[Ruling | Outcome, int] = {"owned": 0, "no-evidence": 1, "refused": 1, "inconclusive": 3}


def judged(found: Judged, suspect: str, report: Path | None) -> list[Table | str]:
    """For people."""
    lines: list[Table | str] = [*checked(found.claim)[:1]]
    owner = found.claim.file.claim.owner
    for name, log10_p in found.innocents:
        lines.append(f"{name}, which can't carry the mark: log10 p = {log10_p:.1f}.")
    lines.append(f"{WORDS[found.outcome]}: that {suspect} carries the mark of {owner}.")
    lines.append(sentence(found.verdict) + "." if found.verdict is not None else found.reason)
    if found.verdict is not None and found.verdict.reused:
        lines.append(from_journal(found.verdict))
    if found.pool == "own":
        lines.append("The inputs were the judge's own choice, not the claim's.")
    if found.claim.attested is None:
        lines.append("Nothing that was given shows when the claim was made.")
    if report is not None:
        lines.append(f"Report: {report}")
    return lines
