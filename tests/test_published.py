"""What is published is what was measured: pages and the README's counts against the committed results."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gradmark.stats import mean_interval

MAKERS = {
    "ROBUSTNESS.md": ["robustness.py"],
    "RESULTS.md": ["tables.py"],
    "TRACE.md": ["trace.py", "--table"],
    "QUERIES.md": ["queries.py", "--table"],
    "SEAL.md": ["seal.py", "--table"],
    "DOMAINS.md": ["domains.py", "--table"],
}


@pytest.fixture(scope="session")
def cells(root: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(
        (root / "benchmarks" / "results" / "robustness" / "cells.json").read_text()
    )
    return [c for c in found if "error" not in c]


@pytest.mark.parametrize("page", MAKERS)
def test_pages_are_made_of_the_committed_results(root: Path, tmp_path: Path, page: str) -> None:
    copy = tmp_path / "benchmarks"
    shutil.copytree(root / "benchmarks", copy, ignore=shutil.ignore_patterns("__pycache__", "work"))
    (copy / page).unlink()
    command = [sys.executable, MAKERS[page][0], *MAKERS[page][1:]]
    subprocess.run(command, cwd=copy, check=True, capture_output=True)
    assert (copy / page).read_text() == (root / "benchmarks" / page).read_text()


def test_the_readme_counts_as_the_cells_do(root: Path, cells: list[dict[str, Any]]) -> None:
    """How often the default is at least as strong as GradSigns, and in how many cells both were read."""
    text = " ".join((root / "README.md").read_text().split())
    claim = re.search(
        r"at least as strong as GradSigns in (\d+) of (\d+) cells of digits and (\d+) of (\d+) of CIFAR-10",
        text,
    )
    assert claim is not None
    counted = []
    for task in ("digits", "cifar10"):
        p = {
            (c["scheme"], c["attack"], c["seed"], c["access"]): c["log10_p"]
            for c in cells
            if c["task"] == task
        }
        both = [
            (p["ensemble", *k[1:]], v)
            for k, v in p.items()
            if k[0] == "gradsigns" and ("ensemble", *k[1:]) in p
        ]
        counted += [sum(ours <= theirs for ours, theirs in both), len(both)]
    assert [int(n) for n in claim.groups()] == counted


def _measured(page: Path, head: str) -> list[list[str]]:
    """The rows of a page's table under ``head`` that name an attack, cell by cell."""
    text = page.read_text()
    section = re.split(r"\n##+ ", text[text.index(head) + len(head) :])[0]
    rows = [line.strip("| ").split(" | ") for line in section.splitlines() if line.startswith("| ")]
    return [row for row in rows if any("`" in cell for cell in row[:2])]


def _own(cells: list[dict[str, Any]], task: str, names: str) -> list[dict[str, Any]]:
    """The default's cells of the first attack named that the task has."""
    for name in re.findall(r"`([^`]+)`", names):
        found = [c for c in cells if (c["task"], c["scheme"], c["attack"]) == (task, "ensemble", name)]
        if found:
            return found
    return []


def _told(cells: list[dict[str, Any]], access: str, *, bold: bool) -> str:
    own = [c for c in cells if c["access"] == access]
    if not own:
        return "-"
    worst = f"{max(c['log10_p'] for c in own):.1f}"
    worst = f"**{worst}**" if bold and any(c["removal"] for c in own) else worst
    return worst if len(own) == 1 else f"{np.median([c['log10_p'] for c in own]):.1f} [{worst}]"


TRACKS = {"digits": "digits", "CIFAR-10": "cifar10", "spoken digits": "speech"}


def test_the_readmes_numbers_are_the_cells(root: Path, cells: list[dict[str, Any]]) -> None:
    costs = next(s for s in (root / "README.md").read_text().splitlines() if s.startswith("| *accuracy that"))
    for task, said in zip(TRACKS.values(), costs.strip("| ").split(" | ")[1:], strict=True):
        own = [c for c in cells if (c["task"], c["scheme"]) == (task, "ensemble")]
        given = list({c["seed"]: c["utility_control"] - c["utility_marked"] for c in own}.values())
        assert said == "{:.2f} [{:.2f}, {:.2f}]".format(np.mean(given), *mean_interval(given)), task
    rows = _measured(root / "README.md", "## Measured\n")
    assert len(rows) > 10
    for name, *columns in rows:
        for task, said in zip(TRACKS.values(), columns, strict=True):
            own = _own(cells, task, name)
            if not own:
                assert said == "not run", name
                continue
            read = " / ".join(_told(own, access, bold=True) for access in ("white", "black"))
            loss = float(np.median([c["stealing_loss"] for c in own]))
            expected = read if "`none`" in name else f"{read}, {0.0 if abs(loss) < 0.05 else loss:.1f}"
            assert said == expected, name


def test_choosing_names_every_attack_that_removes_the_default(
    root: Path, cells: list[dict[str, Any]]
) -> None:
    """With what is left, what it costs the thief, and what it is worth to him."""
    fresh = json.loads((root / "benchmarks" / "results" / "robustness" / "fresh.json").read_text())
    named: dict[str, set[str]] = {task: set() for task in TRACKS.values()}
    for track, attack, left, loss, worth, _ in _measured(
        root / "docs" / "choosing.md", "## What takes the default\n"
    ):
        task = TRACKS[track]
        own = _own(cells, task, attack)
        named[task].add(own[0]["attack"])
        assert left == " / ".join(_told(own, access, bold=False) for access in ("white", "black"))
        assert loss == f"{np.median([c['stealing_loss'] for c in own]):.1f}"
        over = {c["seed"]: c["utility_after"] - fresh[task][str(c["seed"])] for c in own if c["removal"]}
        told = f"{np.mean(list(over.values())):+.1f}"
        if len(over) > 2:
            told += " [{:.1f}, {:.1f}]".format(*mean_interval(list(over.values())))
        assert worth == told, attack
    for task in TRACKS.values():
        own = [c for c in cells if c["task"] == task and c["scheme"] == "ensemble"]
        short = {c["attack"] for c in own if c["stealing_loss"] <= 5 and c["log10_p"] > -6}
        assert named[task] == short


def test_the_readme_counts_the_attacks(root: Path, cells: list[dict[str, Any]]) -> None:
    text = (root / "README.md").read_text()
    section = " ".join(text[text.index("## Measured\n") : text.index("| after |")].split())
    counted = [
        len({c["attack"] for c in cells if c["task"] == task and c["scheme"] == "ensemble"} - {"none"})
        for task in TRACKS.values()
    ]
    assert [int(n) for n in re.findall(r"(\d+) attacks", section)] == counted
