"""``gradmark verify``: is this suspect ours? From what a user names to a verdict and its report."""

from __future__ import annotations

import hashlib
import importlib.util
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from rich.console import Console

from gradmark import catalog
from gradmark.codec import MarkFile
from gradmark.commands.progress import Bar, Watched
from gradmark.data import Data, load_data
from gradmark.ensemble import Ensemble
from gradmark.errors import DataError, EndpointError, MismatchError, UsageError
from gradmark.files import private_folder
from gradmark.keys import OwnerKey
from gradmark.protocols import Access, Batch, BlackBox, Verdict, WhiteBox
from gradmark.report import verdict_report, write_report
from gradmark.schemes.linear import LinearMark
from gradmark.seal import SealFile, check_suspect
from gradmark.suspects import HttpSuspect, open_suspect
from gradmark.suspects.apis import find_api
from gradmark.verify import DEFAULT_ALPHA, DEFAULT_QUERIES, verify, verify_linear
from gradmark.views import suspected


@dataclass(frozen=True)
class Endpoint:
    """How an endpoint is asked. ``headers`` may hold a secret and is never shown."""

    batch_size: int = 64
    timeout: float = 30.0
    journal: Path | None = None
    headers: tuple[tuple[str, str], ...] = ()
    api: str = "json"
    concurrency: int = 1
    rate: float | None = None

    def __repr__(self) -> str:
        return f"Endpoint({self.api}, batch_size={self.batch_size}, journal={self.journal})"


@dataclass(frozen=True)
class VerifyJob:
    """One question: ``suspect`` against ``key`` and ``mark``, or against a ``linear_mark`` file."""

    suspect: str
    data: str
    key: OwnerKey | None = None
    mark: Path | None = None
    linear_mark: Path | None = None
    model: str | None = None
    access: Access | None = None
    queries: int = DEFAULT_QUERIES
    alpha: float = DEFAULT_ALPHA
    keys_tried: int = 1
    seed: int = 0
    report: Path | None = None
    endpoint: Endpoint = Endpoint()
    sequential: bool = False
    seal: Path | None = None
    task: str | None = None
    """Says data, network and scores; ``data`` is empty then."""

    def __post_init__(self) -> None:
        if self.access not in (None, "white", "black"):
            raise UsageError("No such access", expected="white or black", found=repr(self.access))
        if (self.linear_mark is None) == (self.mark is None) or (self.mark is None) != (self.key is None):
            raise UsageError("Which mark is looked for?", expected="--key and --mark, or --linear-mark alone")
        if self.sequential and (self.linear_mark is not None or self.access == "white"):
            raise UsageError(
                "Only a black box and a mark of gradmark's own are read step by step",
                fix="leave --sequential out",
            )
        if self.report is not None and self.report.suffix.lower() not in (".html", ".pdf"):
            raise UsageError(
                "A report can't have this file name", expected="*.html or *.pdf", found=self.report.name
            )
        if self.report is not None and not self.report.resolve().parent.is_dir():
            raise UsageError("The report's folder doesn't exist", found=str(self.report.parent))
        if self.report is not None:
            need_for_reports(pdf=self.report.suffix.lower() == ".pdf")


def run_verify(job: VerifyJob, console: Console) -> Verdict:
    """The verdict; writes ``job.report`` if one is wanted. Progress goes to ``console``.

    An endpoint's answers are kept in a journal until the verdict stands, so that a run that was cut
    short asks nothing twice; a journal that the user named is kept for good.
    """
    mark = MarkFile.load(job.mark) if job.mark is not None else None
    linear = LinearMark.load(job.linear_mark) if job.linear_mark is not None else None
    if mark is not None and job.key is not None:
        mark.check_key(job.key)
    seal = _seal(job)
    data, pool = _data(job)
    journal, ours = _journal(
        job, mark.digest if mark is not None else linear.digest if linear is not None else ""
    )
    opened = _open(job, journal)
    suspect = opened if job.task is None else suspected(catalog.task(job.task), opened)
    try:
        with torch.random.fork_rng(devices=[]), Bar(console) as bar:
            torch.manual_seed(job.seed)
            sealed = None if seal is None else check_suspect(seal, opened, job.access, name=opened.name)
            if seal is not None and sealed is not None and sealed.access == "black":
                job = replace(job, queries=job.queries - seal.queries)
            verdict = _judge(job, mark, linear, suspect, data, pool, bar)
            verdict = replace(verdict, reused=getattr(opened, "reused", 0))
            if seal is not None and sealed is not None:
                sent, kept = (sealed.queries, seal.queries) if sealed.access == "black" else (0, 0)
                verdict = replace(verdict, modified=sealed.modified, own_program=sealed.own_program,
                                  queries=verdict.queries + sent,
                                  queries_allowed=verdict.queries_allowed + kept)  # fmt: skip
    except BaseException as error:
        kept = journal is not None and _holds_answers(journal)
        if ours and journal is not None and not kept:
            journal.unlink(missing_ok=True)
        if kept and isinstance(error, EndpointError):
            told = f"The answers so far are in {journal}: the same command asks nothing twice"
            fix = f"{error.fix.rstrip('.')}. {told}" if error.fix else told
            raise EndpointError(error.what, expected=error.expected, found=error.found, fix=fix) from error
        raise
    finally:
        if isinstance(opened, HttpSuspect):
            opened.close()
    if job.report is not None:
        owner = job.key.owner if job.key is not None else "the linear mark's makers"
        write_report(
            verdict_report(
                verdict,
                owner=owner,
                suspect_name=suspect.name,
                data_name=job.data or str(job.task),
                linear=linear is not None,
                parts=() if mark is None else parts_of(mark),
            ),
            job.report,
        )
    if ours and journal is not None:
        journal.unlink(missing_ok=True)
    return verdict


def _data(job: VerifyJob) -> tuple[Data, Batch]:
    """The data, and the inputs and labels from which the key picks carriers."""
    if job.task is None:
        data = load_data(job.data)
        return data, data.test.all()
    task = catalog.task(job.task)
    return task.data(), task.carriers(task.data().test.all())


def _seal(job: VerifyJob) -> SealFile | None:
    """The seal that was named, if it is the owner's and the budget has room for its queries."""
    if job.seal is None:
        return None
    seal = SealFile.load(job.seal)
    if job.key is not None:
        seal.check_key(job.key)
    if job.queries < seal.queries + 2:
        wanted = f"--queries {seal.queries + 2} or more"
        raise UsageError("The queries don't suffice for the seal", expected=wanted, found=str(job.queries))
    return seal


def parts_of(mark: MarkFile) -> tuple[str, ...]:
    """The names of an ensemble's schemes; none for a single one."""
    rows = mark.scheme_parameters.get("parts", ())
    return tuple(row["scheme"] for row in rows) if mark.scheme == Ensemble.name else ()


def _judge(
    job: VerifyJob,
    mark: MarkFile | None,
    linear: LinearMark | None,
    suspect: BlackBox,
    data: Data,
    pool: Batch,
    bar: Bar,
) -> Verdict:
    access: Access = job.access or (
        "white" if isinstance(suspect, WhiteBox) and not job.sequential else "black"
    )
    common = {"access": access, "alpha": job.alpha, "queries": job.queries, "keys_tried": job.keys_tried}
    if access == "white":
        classes = suspect.query(pool[0][:1]).shape[1] if pool[0].shape[1:] == data.spec.input_shape else 0
        if mark is not None and pool[0].shape[1:] == mark.spec.input_shape and classes != mark.spec.n_classes:
            raise MismatchError(
                "The suspect doesn't fit the mark",
                expected=f"{mark.spec.n_classes} classes",
                found=str(classes),
            )
    watched = Watched(suspect, bar, job.queries) if access == "black" else suspect
    if mark is not None and job.key is not None:
        return verify(mark, job.key, watched, pool, sequential=job.sequential, **common)  # type: ignore[arg-type]
    if linear is None:  # VerifyJob sees to it
        raise UsageError("No mark was given")
    if access == "white":
        return verify_linear(linear, watched, pool, data.spec, **common)  # type: ignore[arg-type]
    # labels alone may not name every class; the first query tells
    spec = replace(data.spec, n_classes=suspect.query(pool[0][:1]).shape[1])
    common["queries"] = max(2, job.queries - 1)
    verdict = verify_linear(linear, watched, pool, spec, **common)  # type: ignore[arg-type]
    return replace(verdict, queries=verdict.queries + 1)


def _open(job: VerifyJob, journal: Path | None) -> BlackBox:
    if not _is_endpoint(job.suspect):
        network = job.model or (None if job.task is None else catalog.task(job.task).network)
        return open_suspect(job.suspect, model=network)
    if job.access == "white":
        raise UsageError("An endpoint can't be read white-box", fix="leave --access out")
    return HttpSuspect(
        job.suspect, api=find_api(job.endpoint.api), batch_size=job.endpoint.batch_size,
        timeout=job.endpoint.timeout, concurrency=job.endpoint.concurrency, rate=job.endpoint.rate,
        budget=job.queries, journal=journal, headers=dict(job.endpoint.headers),
    )  # fmt: skip


def _journal(job: VerifyJob, mark_digest: str) -> tuple[Path | None, bool]:
    """The journal of this question and whether it is ours to remove.

    One that nobody named lies where nobody else can have put it: who could would choose the answers. Where
    there is no such place there is none.
    """
    if not _is_endpoint(job.suspect):
        if job.endpoint.journal is not None:
            raise UsageError("Only an endpoint's answers are kept in a journal", fix="leave --journal out")
        return None, False
    if job.endpoint.journal is not None:
        return job.endpoint.journal, False
    name = hashlib.sha256(f"{job.suspect}\0{mark_digest}\0{job.data or job.task}".encode()).hexdigest()[:12]
    folder = private_folder()
    return (None, False) if folder is None else (folder / f"verify-{name}.journal", True)


def _holds_answers(journal: Path) -> bool:
    try:
        return journal.stat().st_size > 0
    except OSError:
        return False


def _is_endpoint(suspect: str) -> bool:
    return suspect.startswith(("http://", "https://"))


def need_for_reports(*, pdf: bool = False) -> None:
    """UsageError, before anything long starts, where a report couldn't be written in the end."""
    missing = [
        name for name in ("matplotlib", *(["typst"] if pdf else [])) if importlib.util.find_spec(name) is None
    ]
    if missing:
        raise UsageError(f"The report needs {' and '.join(missing)}", fix="pip install 'gradmark[report]'")


def parse_headers(lines: list[str]) -> tuple[tuple[str, str], ...]:
    """``NAME: VALUE`` lines, or ``@FILE`` with one on each line. UsageError that shows no value."""
    found = []
    for line in lines:
        try:
            rows = Path(line[1:]).read_text().splitlines() if line.startswith("@") else [line]
        except (OSError, UnicodeDecodeError) as cause:
            raise DataError("The file of headers can't be read", expected="lines NAME: VALUE") from cause
        for row in filter(str.strip, rows):
            name, colon, value = row.partition(":")
            plain = row.isascii() and row.isprintable()
            if not colon or not name.strip() or not value.strip() or not plain:
                raise UsageError("A header makes no sense", expected="NAME: VALUE, in printable ASCII")
            found.append((name.strip(), value.strip()))
    return tuple(found)
