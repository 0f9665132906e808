"""Reports as single HTML or PDF files: build one with :func:`verdict_report` or :func:`embed_report`, or
from a :class:`Report` of your own, and :func:`write_report` it.

Plots need matplotlib and PDF needs typst: ``pip install 'gradmark[report]'``. Both are imported when used.
"""

from gradmark.report.embedding import embed_report
from gradmark.report.model import Figure, Report, Section, Table
from gradmark.report.render import render_html, render_pdf, write_report
from gradmark.report.seal import check_report
from gradmark.report.verdict import verdict_report

__all__ = [
    "Figure",
    "Report",
    "Section",
    "Table",
    "check_report",
    "embed_report",
    "render_html",
    "render_pdf",
    "verdict_report",
    "write_report",
]
