"""TRACE.md from results/trace: called by ``python benchmarks/trace.py --table``."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from statistics import median
from typing import Any

from gradmark.stats import mean_interval, wilson_interval

Cell = dict[str, Any]
ORDER = (
    "copy", "copy, finetune", "copy, prune", "copy, quantize", "copy, distill",
    "average of 2", "average of 3", "layers of 2", "layers of 3", "single weights of 2", "single weights of 3",
    "midrange of 3", "first, away from second", "average of 2, quantize", "average of 2, finetune", "average of 3, finetune",
    "marked, no copy", "unmarked", "untrained", "copy, another owner's key",
)  # fmt: skip
SHOWN = {
    "copy": "a copy as it was delivered",
    "copy, finetune": "fine-tuned for 5 epochs at the thief's rate (lr .01)",
    "copy, prune": "half of the weights pruned",
    "copy, quantize": "weights of 4 bits",
    "copy, distill": "extracted by soft labels at temperature 4",
    "average of 2": "two copies averaged",
    "average of 3": "three copies averaged",
    "layers of 2": "layers of two copies in turn",
    "layers of 3": "layers of three copies in turn",
    "single weights of 2": "each weight from one of two copies",
    "single weights of 3": "each weight from one of three copies",
    "midrange of 3": "middle of the least and greatest of three weights",
    "first, away from second": "2 x first copy - second copy",
    "average of 2, quantize": "two averaged, weights of 4 bits",
    "average of 2, finetune": "two averaged, then fine-tuned",
    "average of 3, finetune": "three averaged, then fine-tuned",
    "marked, no copy": "the marked network itself",
    "unmarked": "its unmarked control",
    "untrained": "an untrained network",
    "copy, another owner's key": "a copy, asked with another owner's key",
}


def write(results: Path, place: Path) -> None:
    cells = [c for p in sorted(results.glob("*.json")) for c in json.loads(p.read_text())]
    for c in cells:
        if c["suspect"] in ("copy 2", "copy 3"):
            c["suspect"] = "copy"
    tasks = list(dict.fromkeys(c["task"] for c in cells))
    text = [HEAD, *(part(task, [c for c in cells if c["task"] == task]) for task in tasks)]
    place.write_text("\n".join(text), encoding="utf-8")


def part(task: str, cells: list[Cell]) -> str:
    seeds = sorted({c["seed"] for c in cells})
    lines = [f"## {task}: {len(seeds)} owners (seeds {', '.join(map(str, seeds))}), three copies each", ""]
    lines += [*named(cells), "", *innocents(cells), "", *cost(cells), "", *speed(cells), ""]
    return "\n".join(lines)


def named(cells: list[Cell]) -> list[str]:
    lines = [
        "| suspect | access | suspects | somebody guilty named | guilty named, of those involved | log10 p of the first: median, weakest | innocents named | accuracy against the base, points |",
        "|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for name in ORDER:
        for access in ("white", "black"):
            rows = [c for c in cells if (c["suspect"], c["access"]) == (name, access)]
            if rows:
                lines.append(line(name, access, rows))
    return lines


def line(name: str, access: str, rows: list[Cell]) -> str:
    n, guilty = len(rows), sum(r["involved"] for r in rows)
    some, hit = sum(r["named"] > 0 for r in rows), sum(r["named"] for r in rows)
    first = [min(r["log10_p"]) for r in rows if r["log10_p"]]
    p = f"{median(first):.1f}, {max(first):.1f}" if first else ""
    points = [100 * (r["accuracy"] - r["base_accuracy"]) for r in rows]
    found = (f"{some} {share(some, n)}", f"{hit} of {guilty} {share(hit, guilty)}") if guilty else ("", "")
    return (
        f"| {SHOWN[name]} | {access} | {n} | {found[0]} | {found[1]} | {p} "
        f"| {sum(r['innocents_named'] for r in rows)} | {interval(points)} |"
    )


def innocents(cells: list[Cell]) -> list[str]:
    trials = sum(c["trials"]["n"] for c in cells)
    strict, loose = (sum(c["trials"][f"named_{a}"] for c in cells) for a in ("1e-6", "0.05"))
    tested = sum(c["innocents"] for c in cells)
    least = min(c["least_innocent_log10_p"] for c in cells)
    return [
        f"**Innocents.** Of 100,000 licensees, against {len(cells)} suspects: {tested:,} tests of innocent ones, "
        f"{sum(c['innocents_named'] for c in cells)} named; the least corrected log10 p of any is {least:.1f}. "
        f"In {trials} trials, each one suspect against those involved and 1,000 names that occur nowhere else: an innocent "
        f"named in {strict} at alpha 10⁻⁶ {share(strict, trials)}, and in {loose} at alpha .05 {share(loose, trials)}, where at most "
        "5 % are promised.",
    ]  # fmt: skip


def cost(cells: list[Cell]) -> list[str]:
    rows = [c for c in cells if c["suspect"] == "copy" and c["access"] == "white"]
    points = [100 * (c["accuracy"] - c["base_accuracy"]) for c in rows]
    by_seed = [
        sum(v) / len(v)
        for seed in sorted({c["seed"] for c in rows})
        if (v := [100 * (c["accuracy"] - c["base_accuracy"]) for c in rows if c["seed"] == seed])
    ]
    base = [c["base_log10_p"] for c in rows]
    return [
        f"**What a copy costs.** {len(points)} copies: accuracy {interval(points)} points against the network that they were made from "
        f"(means of the owners: {interval(by_seed)}). The base mark in them: log10 p {median(base):.1f}, weakest {max(base):.1f}.",
    ]  # fmt: skip


def speed(cells: list[Cell]) -> list[str]:
    white = [c["cpu_seconds"] for c in cells if c["access"] == "white"]
    derived = [c["codebook"] for c in white if c["codebook"] > 0.1]  # kept between cells of one owner
    parts = {
        "reading": [c["reading"] for c in white],
        "deriving bits": derived,
        "ranking": [c["ranking"] for c in white],
    }
    price = median(derived)
    ratio = [(price + c["ranking"]) / c["reading"] for c in white]
    total = [c["reading"] + price + c["ranking"] for c in white]
    return [
        "**Time.** CPU seconds on one core, median and most of all cells, for 100,000 licensees: "
        + "; ".join(f"{k} {median(v):.2f}, {max(v):.2f}" for k, v in parts.items())
        + f"; together {median(total):.2f}, {max(total):.2f}. Deriving and ranking take {median(ratio):.1f} times as long as the "
        "white-box reading of this small network.",
    ]  # fmt: skip


def share(k: int, n: int) -> str:
    low, high = wilson_interval(k, n)
    return f"[{100 * low:.1f} %, {100 * high:.1f} %]"


def interval(values: Iterable[float]) -> str:
    found = list(values)
    mean = sum(found) / len(found)
    if len(found) < 2:
        return f"{mean:.2f}"
    low, high = mean_interval(found)
    return f"{mean:.2f} [{low:.2f}, {high:.2f}]"


HEAD = """# Whose copy is it

Regenerated by `python benchmarks/trace.py --table` from `results/trace`; measured by `gradmark bench benchmarks/suites/digits.toml
--out bench-out --only none` (the marked networks) and `python benchmarks/trace.py bench-out`.

Each owner has a network that carries the default mark, and makes three copies of it for three of 100,000 licensees, by a fine-tune of
a few epochs. Each suspect is read once and compared with all 100,000. A licensee is *named* if his p, times 100,000 and times 2 for
each round, is at most 10⁻⁶. Black-box: 1,000 queries; white-box: every
input that no training saw. Settings were chosen on one other network and key.
In brackets: 95 % intervals, Wilson's for shares, Student's for means; cells of one owner share a network and aren't independent.
"""
