"""How far a transcript is from the right one."""

from __future__ import annotations

from collections.abc import Sequence


def edit_distance(said: Sequence[object], right: Sequence[object]) -> int:
    """Fewest insertions, deletions and replacements that make one of the other (Levenshtein 1966)."""
    row = list(range(len(right) + 1))
    for i, a in enumerate(said, 1):
        before, row[0] = row[0], i
        for j, b in enumerate(right, 1):
            before, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, before + (a != b))
    return row[-1]
