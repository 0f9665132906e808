"""What is published is what was measured: pages and the README's counts against the committed results."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

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


@pytest.mark.parametrize("task", ["digits", "cifar10"])
def test_the_readme_names_every_attack_that_removes_the_default(
    root: Path, cells: list[dict[str, Any]], task: str
) -> None:
    row = next(s for s in (root / "README.md").read_text().splitlines() if s.startswith("| removed (log10 p"))
    column = row.split(" | ")[1 if task == "digits" else 2]
    own = [c for c in cells if c["task"] == task and c["scheme"] == "ensemble"]
    short = {c["attack"] for c in own if c["stealing_loss"] <= 5 and c["log10_p"] > -6}
    words = {
        "hard-labels": "or of labels alone",
        "output-match+distill": "a student of matched answers",
        "output-match+distill-sibling": "if his network saw all the owner's data",
        "output-match-linear+distill": "of answers matched further",
        "output-match-kernel+distill": "by a kernel",
        "output-graft+distill": "of labels with his own network's scores",
        "rtal-owner": "RTAL at the owner's rate",
        "regularize": "regularised retraining",
        "finetune-lr3": "fine-tuning at the owner's rate",  # a thief's is a third of it there
    }
    assert short == {attack for attack, named in words.items() if named in column}
    others = re.search(r"by none of the (\d+) others", column)
    assert others is not None
    assert int(others.group(1)) == len({c["attack"] for c in own} - {"none"}) - len(short)
