"""The list of licensees: one name a line, a JSON list, or the first column of a CSV table."""

from __future__ import annotations

import csv
import io
import json
import unicodedata
from collections.abc import Sequence
from pathlib import Path

from gradmark.errors import DataError
from gradmark.files import read_limited

MOST = 1_000_000
_LONGEST = 200
_MOST_BYTES = 256 << 20
_COLUMNS = ("licensee", "licensee_id", "id")


def clean(name: str) -> str:
    """``name`` in Unicode NFC without outer spaces: the form in which it enters a copy's bits.

    DataError unless it is 1 to 200 characters without control characters.
    """
    text = unicodedata.normalize("NFC", name).strip()
    bad = any(unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp") for c in text)
    if not 1 <= len(text) <= _LONGEST or bad:
        raise DataError(
            "A licensee's name can't be used",
            expected=f"1 to {_LONGEST} characters without control characters",
            found=repr(text[:60]),
        )
    return text


def read_licensees(path: Path) -> list[str]:
    """The names in ``path``, cleaned, in their order. DataError where it can't be read or a name comes twice.

    ``.json``: a list of names. ``.csv``: a table whose column is called licensee, licensee_id or id, or
    else its first column. Anything else: text with one name a line; blank lines don't count.
    """
    data = read_limited(path, what="list of licensees", error=DataError, limit=_MOST_BYTES)
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as cause:
        raise DataError("The list of licensees can't be read", expected="text in UTF-8") from cause
    reader = {".json": _from_json, ".csv": _from_csv}.get(path.suffix.lower(), str.splitlines)
    return checked([name for name in reader(text) if name.strip()])


def checked(names: Sequence[str]) -> list[str]:
    """``names`` cleaned; DataError where there are none, too many, or one of them twice."""
    found = [clean(name) for name in names]
    if not 1 <= len(found) <= MOST:
        raise DataError(
            "Nobody can be traced with this list", expected=f"1 to {MOST:,} licensees", found=str(len(found))
        )
    seen: set[str] = set()
    for name in found:
        if name in seen:
            raise DataError("A licensee is listed twice", found=repr(name), fix="Remove one of the two")
        seen.add(name)
    return found


def _from_json(text: str) -> list[str]:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as cause:
        raise DataError("The list of licensees can't be read", expected="a JSON list of names") from cause
    if not isinstance(found, list) or not all(isinstance(name, str) for name in found):
        raise DataError(
            "The list of licensees can't be read", expected="a JSON list of names", found=type(found).__name__
        )
    return found


def _from_csv(text: str) -> list[str]:
    try:
        rows = [row for row in csv.reader(io.StringIO(text, newline="")) if row]
    except csv.Error as cause:
        raise DataError("The list of licensees can't be read", expected="a CSV table") from cause
    if not rows:
        return []
    head = [cell.strip().lower() for cell in rows[0]]
    column = next((head.index(name) for name in _COLUMNS if name in head), None)
    if column is None:
        return [row[0] for row in rows]
    return [row[column] if len(row) > column else "" for row in rows[1:]]
