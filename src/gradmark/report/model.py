"""What a report consists of: plain frozen values that :mod:`gradmark.report.render` turns into a file."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

Kind = Literal["svg", "png"]
Tone = Literal["owned", "none", "inconclusive"]
RowMark = Literal["good", "bad", "plain"]


@dataclass(frozen=True)
class Table:
    """Rows of text under ``head``; ``mark`` gives each row's status, or is empty if all are plain."""

    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""
    mark: tuple[RowMark, ...] = ()


@dataclass(frozen=True)
class Figure:
    """A picture as the bytes of a file of type ``kind``.

    ``title`` is its caption, ``alt`` says the same to who can't see it.
    """

    title: str
    alt: str
    svg_or_png: bytes = field(repr=False)
    kind: Kind


@dataclass(frozen=True)
class Section:
    """A heading with paragraphs, then commands to copy (``code``), tables and figures."""

    heading: str
    paragraphs: tuple[str, ...] = ()
    tables: tuple[Table, ...] = ()
    figures: tuple[Figure, ...] = ()
    code: tuple[str, ...] = ()


@dataclass(frozen=True)
class Report:
    """A question, its answer, and everything a reader needs to doubt it.

    All strings are plain text, never markup: whatever they hold is shown as it is. ``tone`` colours and
    labels the answer, unless ``label`` does; ``footer`` holds versions and dates.
    """

    title: str
    question: str
    answer: str
    tone: Tone
    sections: tuple[Section, ...]
    footer: dict[str, str] = field(default_factory=dict)
    label: str = ""


__all__ = ["Figure", "Kind", "Report", "RowMark", "Section", "Table", "Tone"]
