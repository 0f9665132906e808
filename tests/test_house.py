"""The rules of the house: layers, light imports, short files, commands that exist."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

LONGEST = 300
HEAVY = {
    *("matplotlib", "sklearn", "onnx", "onnxruntime", "httpx2", "torchao"),
    *("transformers", "accelerate", "lightning", "peft"),
}
TEXT = {".md", ".py", ".toml", ".txt", ".html", ".css", ".jinja", ".j2", ".json", ".cfg", ".yaml", ".yml", ""}
FOLDERS = ("src", "tests", "docs", "benchmarks", "examples", "tools", ".ci")
MACHINE_PATH = re.compile(r"(?<![\w.~-])/(?:root|work|tmp|home/\w+)/")


def texts(root: Path) -> Iterator[Path]:
    """The files that the public reads."""
    found = [p for p in root.iterdir() if p.is_file()]
    for folder in FOLDERS:
        found += [p for p in (root / folder).rglob("*") if p.is_file()]
    skip = {"_build", "__pycache__"}
    for path in found:
        hidden = path.name.startswith(".") and path.name != ".gitignore"
        if path.suffix in TEXT and not hidden and not skip & set(path.relative_to(root).parts):
            yield path


def lint_imports(root: Path) -> subprocess.CompletedProcess[str]:
    """import-linter on the package under ``root``."""
    env = os.environ | {"PYTHONPATH": str(root / "src")}
    command = Path(sys.executable).with_name("lint-imports")
    return subprocess.run(
        [command, "--no-cache"], cwd=root, env=env, capture_output=True, text=True, check=False
    )


def copy_house(root: Path, to: Path) -> Path:
    shutil.copytree(root / "src", to / "src", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(root / "pyproject.toml", to)
    return to


def test_layers_hold(root: Path) -> None:
    result = lint_imports(root)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize(
    ("file", "line", "broken"),
    [
        ("errors.py", "import gradmark.protocols", "rows below"),
        ("stray.py", "", "rows below"),
    ],
    ids=["an import upwards", "a module without a row"],
)
def test_layers_notice(root: Path, tmp_path: Path, file: str, line: str, broken: str) -> None:
    house = copy_house(root, tmp_path)
    with (house / "src" / "gradmark" / file).open("a") as stream:
        stream.write(f"\n{line}\n")
    result = lint_imports(house)
    assert result.returncode != 0
    assert broken in result.stdout


def test_leaves_are_noticed(root: Path, tmp_path: Path) -> None:
    house = copy_house(root, tmp_path)
    schemes = house / "src" / "gradmark" / "schemes"
    schemes.mkdir(exist_ok=True)
    (schemes / "__init__.py").touch()
    (schemes / "one.py").write_text("ONE = 1\n")
    (schemes / "two.py").write_text("from gradmark.schemes.one import ONE\n")
    result = lint_imports(house)
    assert result.returncode != 0
    assert "Leaves never import one another BROKEN" in result.stdout


def test_import_is_light() -> None:
    code = "import sys, gradmark; print(*{name.partition('.')[0] for name in sys.modules})"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert not HEAVY & set(result.stdout.split())


def test_files_are_short(root: Path) -> None:
    files = (root / "src").rglob("*.py")
    lengths = {str(p.relative_to(root)): len(p.read_text().splitlines()) for p in files}
    assert {name: n for name, n in lengths.items() if n > LONGEST} == {}


def test_no_path_of_one_machine(root: Path) -> None:
    found = [
        f"{path.relative_to(root)}: {match.group()}"
        for path in texts(root)
        for match in MACHINE_PATH.finditer(path.read_text(errors="replace"))
    ]
    assert found == []


def test_machine_paths_are_noticed() -> None:
    assert MACHINE_PATH.search("see " + "/".join(["", "work", "shared"]))
    assert not MACHINE_PATH.search("https://example.org/" + "/".join(["our", "work", "x"]))


def test_readme_commands_exist(root: Path) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (root / "Makefile").read_text(), re.MULTILINE))
    readme = (root / "README.md").read_text()
    named = set(re.findall(r"(?:^\s*\$?\s*|`|&& )make ([a-z-]+)", readme, re.MULTILINE))
    assert named, "the README names no make target"
    assert named <= targets


def test_pins_fit_every_machine(root: Path) -> None:
    pins = [p for p in (root / "constraints.txt").read_text().splitlines() if not p.startswith("#")]
    assert [p for p in pins if not re.fullmatch(r"[A-Za-z0-9._-]+==[0-9][0-9a-z.]*", p)] == []
    assert [p for p in pins if p.startswith(("nvidia", "triton==", "cuda"))] == []
    assert "torch==2.13.0" in pins
