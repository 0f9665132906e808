"""``gradmark audit``: can the mark be found, and does it harm? A model beside its unmarked control."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from gradmark import catalog
from gradmark.audit import Audit, Detector, audit, audit_report
from gradmark.audit.page import answer, remedies
from gradmark.codec import MarkFile
from gradmark.commands.progress import Bar
from gradmark.commands.verify import need_for_reports
from gradmark.data import load_data
from gradmark.errors import UsageError
from gradmark.protocols import BlackBox, ModelSpec, Scheme
from gradmark.report import write_report
from gradmark.suspects import open_suspect


@dataclass(frozen=True)
class AuditJob:
    """``subject`` against ``control`` (files), on ``data``; ``mark`` tells the scheme's parameters."""

    subject: str
    control: str
    data: str
    model: str | None = None
    mark: Path | None = None
    queries: int = 2000
    seed: int = 0
    report: Path | None = None

    def __post_init__(self) -> None:
        if self.report is not None:
            suffix = self.report.suffix.lower()
            if suffix not in (".html", ".pdf"):
                raise UsageError(
                    "A report can't have this file name", expected="*.html or *.pdf", found=self.report.name
                )
            if not self.report.resolve().parent.is_dir():
                raise UsageError("The report's folder doesn't exist", found=str(self.report.parent))
            need_for_reports(pdf=suffix == ".pdf")

    def command(self) -> str:
        """How to ask again, with the files' names left to fill in."""
        given = {"--mark": self.mark and "mark.json", "--model": self.model, "--queries": self.queries,
                 "--seed": self.seed}  # fmt: skip
        rest = " ".join(f"{name} {value}" for name, value in given.items() if value is not None)
        return f"gradmark audit MODEL --control CONTROL --data DATA \\\n    {rest} --report again.html"


def run_audit(job: AuditJob, console: Console) -> Audit:
    """Open what was named, compare, and write ``job.report`` if one is wanted."""
    data = load_data(job.data)
    scheme, spec = _scheme(job, data.spec)
    model, control = (open_suspect(_file(name), model=job.model) for name in (job.subject, job.control))
    model, control = _told_apart(model, control)
    with Bar(console) as bar:
        found = audit(
            model, control, data.test.all(), spec, scheme, seed=job.seed, queries=job.queries, report=bar.move
        )
    if job.report is not None:
        write_report(audit_report(found, job.command()), job.report)
    return found


def audited(found: Audit, report: Path | None) -> list[Table | str]:
    """What a terminal shows: detectors and side effects, those that stand out first."""
    looks = Table("", "Detector", "model", "control (95%)", "z", title_justify="left")
    looks.columns[1].min_width = 30
    for d in _first(found.detectors):
        around = f"{d.low:.3g} to {d.high:.3g}"
        looks.add_row(
            "!" if d.striking else "", f"{d.part}: {d.name}",
            f"AUC {d.auc:.2f}" if d.auc is not None else f"{d.model:.3g}",
            around if d.control is None else f"{d.control:.3g} ({around})",
            "" if d.z is None else f"{d.z:+.1f}",
        )  # fmt: skip
    harms = Table("Side effect", "model", "control", "difference", "95%", "finding", title_justify="left")
    for e in [e for e in found.side_effects if e.worse or e.kind != "class"]:
        cells = [f"{v:.3f}" for v in (e.model, e.control)] + [
            f"{e.difference:+.3f}",
            f"{e.low:+.3f} to {e.high:+.3f}",
        ]
        harms.add_row(e.name, *cells, "worse" if e.worse else "")
    lines: list[Table | str] = [looks, "! stands out.", harms, *found.notes]
    lines += [answer(found), *remedies(found.worse)]
    lines.append("Two networks can't tell a mark from the luck of training: benchmarks/detect.py asks many.")
    return [*lines, f"Report: {report}"] if report is not None else lines


def _first(rows: Sequence[Detector]) -> list[Detector]:
    """Those that stand out, then the others of the gradients and queries."""
    rest = [d for d in rows if not d.striking and d.part != "weights"]
    return [d for d in rows if d.striking] + rest


def _scheme(job: AuditJob, spec: ModelSpec) -> tuple[Scheme, ModelSpec]:
    """The family to look for, and the spec that it was derived for."""
    if job.mark is None:
        return catalog.scheme(catalog.FLAGSHIP), spec
    mark = MarkFile.load(job.mark)
    return catalog.scheme(mark.scheme, mark.scheme_parameters), mark.spec


def _file(name: str) -> str:
    if name.startswith(("http://", "https://")):
        raise UsageError("An audit sends many thousand queries", expected="a model file", found="an endpoint")
    return name


def _told_apart(model: BlackBox, control: BlackBox) -> tuple[BlackBox, BlackBox]:
    """Two files of one name get names that a reader can tell apart."""
    if model.name == control.name:
        for suspect, name in ((model, "model"), (control, "control")):
            suspect.name = f"{suspect.name} ({name})"
    return model, control
