"""``gradmark bench``: run a suite, then sum up all cells in files, a table and pictures."""

from __future__ import annotations

import json
from dataclasses import dataclass
from dataclasses import replace as changed
from pathlib import Path
from typing import Any

from rich.console import Console

from gradmark.bench.cells import REMOVED, WORTH, versions
from gradmark.bench.run import run_suite
from gradmark.bench.suite import described, find_suite
from gradmark.bench.table import gather, markdown, sound
from gradmark.codec import atomic_write
from gradmark.commands.job import need_device
from gradmark.commands.progress import Bar
from gradmark.commands.verify import need_for_reports
from gradmark.errors import OutputPathError, UsageError
from gradmark.report.bench_plots import heatmap, pareto


@dataclass(frozen=True)
class BenchJob:
    """What to run. ``seed`` is added to each of the suite's seeds; ``fresh`` does finished cells again."""

    suite: str
    out: Path
    fresh: bool = False
    ray: str | None = None
    jobs: int = 1
    only: str | None = None
    seed: int = 0
    device: str = "cpu"

    def __post_init__(self) -> None:
        if self.ray is not None and self.jobs != 1:
            raise UsageError("--ray and --jobs exclude each other")
        need_device(self.device)


@dataclass(frozen=True)
class Benched:
    """What there is now, and what was done for it."""

    suite: str
    done: dict[str, int]
    cells: int
    errors: list[dict[str, Any]]
    removed: list[dict[str, Any]]
    files: list[str]

    def to_json(self) -> dict[str, Any]:
        return {"suite": self.suite, "done": self.done, "cells": self.cells, "errors": self.errors,
                "removed": self.removed, "files": self.files, "versions": versions()}  # fmt: skip

    def shown(self) -> list[str]:
        """What a terminal shows."""
        lines = [
            f"{self.cells} cells; {self.done['units']} of {self.done['units_in_all']} attacks and "
            f"{self.done['networks']} networks were done now.",
            f"The mark was removed in {len(self.removed)} cells (log10 p above {REMOVED:g} for at most "
            f"{WORTH:g} points of utility).",
        ]
        if self.errors:
            lines.append(f"{len(self.errors)} cells failed; the table says why. --fresh tries them again.")
        return [*lines, f"Written: {', '.join(self.files)}"]


def run_bench(job: BenchJob, console: Console) -> Benched:
    """Do ``job``; progress goes to ``console``. Cells of earlier runs into the same folder count as well."""
    need_for_reports()
    suite = find_suite(job.suite)
    if job.seed:
        suite = changed(suite, seeds=tuple(seed + job.seed for seed in suite.seeds))
    if job.out.exists() and not job.out.is_dir():
        raise OutputPathError("The output folder is a file", found=str(job.out))
    suite.units(job.only)  # refuses unknown names before anything is written
    try:
        (job.out / "cells").mkdir(parents=True, exist_ok=True)
    except OSError as cause:
        raise OutputPathError(
            "The output folder can't be made", found=f"{cause.strerror}: {job.out}"
        ) from cause
    with Bar(console) as bar:
        done = run_suite(
            suite, job.out, jobs=job.jobs, ray=job.ray, device=job.device, only=job.only, fresh=job.fresh,
            moved=bar.move, report=bar.train,
        )  # fmt: skip
    cells = gather(job.out)
    files = write_summary(cells, job.out, suite.name, described(suite))
    failed = [_named(cell) | {"error": cell["error"]} for cell in cells if "error" in cell]
    removed = [
        _named(cell) | {"log10_p": cell["log10_p"], "stealing_loss": cell["stealing_loss"]}
        for cell in sound(cells) if cell["removal"]
    ]  # fmt: skip
    return Benched(suite.name, done, len(cells), failed, removed, files)


def write_summary(cells: list[dict[str, Any]], out: Path, name: str, suite: dict[str, Any]) -> list[str]:
    """results.json, table.md, and two pictures per task; returns their paths."""
    content: dict[str, bytes] = {
        "results.json": (json.dumps({"suite": suite, "cells": cells}, indent=1) + "\n").encode(),
        "table.md": markdown(cells, f"Benchmark {name}").encode(),
    }
    for task in dict.fromkeys(cell["task"] for cell in sound(cells)):
        rows = _ordered([cell for cell in sound(cells) if cell["task"] == task])
        file = task.replace(":", "_")
        content[f"pareto-{file}.png"] = pareto(rows, task, removed=REMOVED, worth=WORTH).svg_or_png
        content[f"heatmap-{file}.png"] = heatmap(rows, task, removed=REMOVED, worth=WORTH).svg_or_png
    for file, data in content.items():
        atomic_write(out / file, data, overwrite=True)
    return [str(out / file) for file in content]


def _ordered(cells: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The flagship and the model without an attack come first."""
    return sorted(cells, key=lambda c: (not c["flagship"], c["attack"] != "none", c["access"] != "white"))


def _named(cell: dict[str, Any]) -> dict[str, Any]:
    return {name: cell[name] for name in ("task", "scheme", "attack", "seed", "access")}
