"""Cells read back, and summed up in Markdown."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from statistics import median
from typing import Any

from gradmark.bench.cells import REMOVED, WORTH
from gradmark.errors import DataError
from gradmark.suspects import file_digest

Cell = dict[str, Any]


def gather(out: Path) -> list[Cell]:
    """Every cell under ``out``, in a fixed order, but for those of a network that was replaced since.

    DataError where a file is no list of cells.
    """
    cells: list[Cell] = []
    present = {p.stem: file_digest(p) for p in (out / "networks").glob("*.safetensors")}
    for path in sorted((out / "cells").rglob("*.json")):
        try:
            rows = json.loads(path.read_text())
            owners = [f"{row['task'].replace(':', '_')}-{row['scheme']}-{row['seed']}" for row in rows]
            cells += [
                {"attack": str(row["attack"]), **row}
                for row, name in zip(rows, owners, strict=True)
                if present.get(name, row["network"]) == row["network"]
            ]
        except (OSError, ValueError, LookupError, TypeError) as cause:
            raise DataError(f"{path.name} holds no cells", found=str(cause), fix="Remove it") from cause
    return sorted(cells, key=lambda c: (c["task"], c["scheme"], c["attack"], c["seed"], c["access"]))


def sound(cells: Iterable[Cell]) -> list[Cell]:
    """Those whose attack could be run."""
    return [cell for cell in cells if "error" not in cell]


def names(cells: Iterable[Cell], field: str) -> list[str]:
    """The values of a field: the flagship first among schemes, ``none`` among attacks, then as first met."""
    found = dict.fromkeys(
        cell[field]
        for cell in sorted(
            cells, key=lambda c: not c.get("flagship") if field == "scheme" else c[field] != "none"
        )
    )
    return list(found)


def evidence(cells: list[Cell]) -> tuple[float, float] | None:
    """Median log10 p over seeds, and the weakest; None where there is none."""
    values = [cell["log10_p"] for cell in cells]
    return (float(median(values)), float(max(values))) if values else None


def markdown(cells: list[Cell], title: str) -> str:
    """Per task and access: attacks down, schemes across, with what the attack cost the thief."""
    lines = [f"# {title}", "", _legend(), ""]
    for task in dict.fromkeys(cell["task"] for cell in cells):
        of_task = [cell for cell in cells if cell["task"] == task]
        lines += [f"## {task}", "", *_fidelity(of_task), ""]
        for access in ("white", "black"):
            chosen = sound(cell for cell in of_task if cell["access"] == access)
            if chosen:
                lines += [f"### {access}-box", "", *_table(chosen), ""]
        lines += _errors(of_task)
    return "\n".join(lines).rstrip() + "\n"


def _legend() -> str:
    return (
        f"Median log10 p over seeds [weakest], then the points of utility that the thief gave up (median). "
        f"**Bold**: in some seed the mark was removed, with log10 p above {REMOVED:g} at a price of at most "
        f"{WORTH:g} points."
    )


def _fidelity(cells: list[Cell]) -> list[str]:
    rows = [
        "| scheme | utility, marked | utility, control | cost in points | seeds |",
        "|---|---|---|---|---|",
    ]
    for scheme in names(cells, "scheme"):
        by_seed = {
            c["seed"]: (c["utility_marked"], c["utility_control"]) for c in cells if c["scheme"] == scheme
        }
        marked = sum(a for a, _ in by_seed.values()) / len(by_seed)
        control = sum(b for _, b in by_seed.values()) / len(by_seed)
        rows.append(f"| {scheme} | {marked:.2f} | {control:.2f} | {control - marked:+.2f} | {len(by_seed)} |")
    return rows


def _table(cells: list[Cell]) -> list[str]:
    schemes = names(cells, "scheme")
    head = " | ".join(f"{scheme} | loss" for scheme in schemes)
    lines = [f"| attack | {head} |", "|---" * (1 + 2 * len(schemes)) + "|"]
    for attack in names(cells, "attack"):
        row = [attack]
        for scheme in schemes:
            chosen = [c for c in cells if c["attack"] == attack and c["scheme"] == scheme]
            row += _entry(chosen)
        lines.append(f"| {' | '.join(row)} |")
    return lines


def _entry(cells: list[Cell]) -> list[str]:
    found = evidence(cells)
    if found is None:
        return ["", ""]
    text = f"{found[0]:.1f} [{found[1]:.1f}]"
    if any(cell["removal"] for cell in cells):
        text = f"**{text}**"
    return [text, f"{median(cell['stealing_loss'] for cell in cells):+.1f}"]


def _errors(cells: list[Cell]) -> list[str]:
    failed = {(c["attack"], c["scheme"], c["error"]): c for c in cells if "error" in c}
    if not failed:
        return []
    return ["Attacks that couldn't be run:", "",
            *(f"- {attack} on {scheme}: {error}" for attack, scheme, error in failed), ""]  # fmt: skip
