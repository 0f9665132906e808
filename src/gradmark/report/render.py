"""A report as one HTML file that needs nothing else, or as PDF. Text is never taken for markup."""

from __future__ import annotations

import base64
import json
import os
import tempfile
from dataclasses import asdict
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2

from gradmark.codec import atomic_write
from gradmark.errors import UsageError, visible
from gradmark.report.model import Report

LABELS = {"owned": "Mark found", "none": "No evidence", "inconclusive": "Inconclusive"}


def render_html(report: Report) -> str:
    """The report as a single page without scripts or outside resources."""
    source = resources.files(__package__).joinpath("report.html.j2").read_text(encoding="utf-8")
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    content = _clean(asdict(report))
    for section in content["sections"]:
        for figure in section["figures"]:
            figure["data"] = _data_url(figure["kind"], figure.pop("svg_or_png"))
    label = content["label"] or LABELS[report.tone]
    return environment.from_string(source).render(report=content, label=label)


def render_pdf(report: Report) -> bytes:
    """The report as PDF, by the ``typst`` package; UsageError if that isn't installed."""
    try:
        import typst
    except ImportError as e:
        raise UsageError(
            "PDF reports need typst",
            found="no such package",
            fix="pip install 'gradmark[report]', or write the report as .html",
        ) from e
    content = _clean(asdict(report))
    template = resources.files(__package__).joinpath("report.typ").read_bytes()
    with tempfile.TemporaryDirectory(prefix="gradmark-report-") as name:
        folder = Path(name)
        (folder / "main.typ").write_bytes(template)
        figures = [figure for section in content["sections"] for figure in section["figures"]]
        for i, figure in enumerate(figures):
            figure["file"] = f"figure-{i}.{figure['kind']}"
            (folder / figure["file"]).write_bytes(figure.pop("svg_or_png"))
        data = json.dumps({**content, "label": content["label"] or LABELS[report.tone]})
        (folder / "report.json").write_text(data, encoding="utf-8")
        return bytes(typst.compile(str(folder / "main.typ"), root=str(folder), format="pdf"))


def write_report(report: Report, path: str | os.PathLike[str]) -> None:
    """Write ``path`` (.html or .pdf, replaced if it exists) as a whole or not at all.

    Raises UsageError on another suffix, OutputPathError where the file can't be written.
    """
    suffix = Path(path).suffix.lower()
    if suffix == ".html":
        data = render_html(report).encode()
    elif suffix == ".pdf":
        data = render_pdf(report)
    else:
        raise UsageError(
            "A report can't have this file name", expected="*.html or *.pdf", found=repr(Path(path).name)
        )
    atomic_write(path, data, overwrite=True)


def _data_url(kind: str, data: bytes) -> str:
    kind = {"svg": "svg+xml"}.get(kind, kind)
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def _clean(value: Any) -> Any:
    """``value`` with invisible characters in its strings made visible, as U+FFFD."""
    if isinstance(value, str):
        return visible(value)
    if isinstance(value, dict):
        return {_clean(key): _clean(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_clean(item) for item in value]
    return value


__all__ = ["render_html", "render_pdf", "write_report"]
