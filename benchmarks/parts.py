"""Which part of a mark outlives which attack, and what combining the parts otherwise would make of it.

    gradmark bench benchmarks/suites/digits-keyed.toml --out bench-out
    python benchmarks/parts.py bench-out ensemble+whole+keyed

Cells hold what each scheme of an ensemble reads by itself. Of every task in the folder that has the mark: medians over seeds
into results/parts/TASK-MARK.json, with the weakest seed of all parts together, and a heat map beside it. Prints, for the
attacks of five points or less, the weakest readings by Fisher's combination of the parts, and by the better of it and the best
part alone times their number, times two (Bonferroni): a rule that pays where one part alone outlives.
"""

from __future__ import annotations

import argparse
import json
import math
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

from gradmark.files import atomic_write
from gradmark.report.bench_plots import heatmap
from robustness import GOAL, WORTH

FOLDER = Path(__file__).parent / "results" / "parts"
SHOWN = 12
Cell = dict[str, Any]


def collect(out: Path, mark: str) -> dict[str, list[Cell]]:
    """The mark's cells whose parts were read, by task."""
    found: dict[str, list[Cell]] = {}
    for folder in sorted((out / "cells").glob(f"*/{mark}")):
        cells = [cell for path in sorted(folder.glob("*.json")) for cell in json.loads(path.read_text())]
        kept = [cell for cell in cells if cell.get("parts")]
        if kept:
            found[kept[0]["task"]] = kept
    return found


def either(cell: Cell) -> float:
    """log10 p of the better of Fisher's combination and the best part's, paid for as two tests."""
    each = [part["log10_p"] for part in cell["parts"] if part["n"]]
    best = min(each) + math.log10(len(each))
    return min(0.0, min(cell["log10_p"], best) + math.log10(2))


def summary(cells: list[Cell]) -> list[Cell]:
    """One row for every attack and access."""
    groups: dict[tuple[str, str], list[Cell]] = defaultdict(list)
    for cell in cells:
        groups[cell["attack"], cell["access"]].append(cell)
    rows = []
    for (attack, access), own in groups.items():
        parts: dict[str, dict[str, Any]] = {}
        for name in (part["scheme"] for part in own[0]["parts"]):
            read = [part for cell in own for part in cell["parts"] if part["scheme"] == name and part["n"]]
            if read:
                parts[name] = {
                    k: round(median(part[k] for part in read), 3) for k in ("log10_p", "n_match", "n", "mean")
                }
        rows.append({
            "attack": attack, "access": access, "seeds": len(own), "parts": parts,
            "stealing_loss": round(median(c["stealing_loss"] for c in own), 2),
            "log10_p": round(median(c["log10_p"] for c in own), 2),
            "weakest": round(max(c["log10_p"] for c in own), 2),
            "weakest, either": round(max(either(c) for c in own), 2),
        })  # fmt: skip
    return sorted(rows, key=lambda row: (row["attack"] != "none", row["attack"], row["access"] != "white"))


def columns(rows: list[Cell]) -> Iterator[Cell]:
    """The heat map's cells: all parts together, then each by itself."""
    for row in rows:
        told = {k: row[k] for k in ("attack", "access", "stealing_loss")}
        yield {**told, "scheme": "together", "log10_p": row["log10_p"]}
        yield from (
            {**told, "scheme": name, "log10_p": part["log10_p"]} for name, part in row["parts"].items()
        )


def told(rows: list[Cell]) -> Iterator[str]:
    worth = sorted((r for r in rows if r["stealing_loss"] <= WORTH), key=lambda r: -r["weakest"])
    short = [sum(r[k] > GOAL for r in worth) for k in ("weakest", "weakest, either")]
    yield f"{len(worth)} rows at {WORTH:g} points or less; short by Fisher's {short[0]}, by either {short[1]}"
    yield "| attack | access | loss | weakest | weakest, either | parts, medians |"
    yield "|---|---|---|---|---|---|"
    for r in worth[:SHOWN]:
        parts = ", ".join(f"{name} {part['log10_p']:.1f}" for name, part in r["parts"].items())
        numbers = f"{r['stealing_loss']:.1f} | {r['weakest']:.1f} | {r['weakest, either']:.1f}"
        yield f"| {r['attack']} | {r['access']} | {numbers} | {parts} |"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, help="a folder of `gradmark bench`")
    parser.add_argument("mark", help="the label of an ensemble in it")
    given = parser.parse_args()
    FOLDER.mkdir(parents=True, exist_ok=True)
    for task, cells in collect(given.out, given.mark).items():
        rows, place = summary(cells), FOLDER / f"{task}-{given.mark}"
        lines = ",\n".join(json.dumps(row) for row in rows)
        atomic_write(Path(f"{place}.json"), f"[\n{lines}\n]\n".encode(), overwrite=True)
        picture = heatmap(list(columns(rows)), f"{task}, {given.mark}", removed=GOAL, worth=WORTH)
        atomic_write(Path(f"{place}.png"), picture.svg_or_png, overwrite=True)
        print(f"\n### {task}, {given.mark}\n", *told(rows), sep="\n")


if __name__ == "__main__":
    main()
