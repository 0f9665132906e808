"""The threat model is a type: what needs weights can't be pointed at an endpoint, and mypy says so."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

mypy = pytest.importorskip("mypy.api")

HEAD = """
import torch
from gradmark import FilterGradient, MarkFile, Marker, ModelSpec, OwnerKey, Verdict, open_suspect, verify
from gradmark.protocols import Access, Attack, BlackBox, Scheme, WhiteBox
from gradmark.suspects import CallableSuspect, HttpSuspect, ModuleSuspect

def gradient(suspect: WhiteBox) -> torch.Tensor:
    return suspect.vjp(torch.zeros(1, 2), torch.zeros(1, 3))

def ask(suspect: BlackBox) -> torch.Tensor:
    return suspect.query(torch.zeros(1, 2))

key = OwnerKey.from_seed(1)
spec = ModelSpec("vector", (2,), 3)
mark = MarkFile.create(key, "filter-gradient", {}, spec, "sign", 10)
pool = (torch.zeros(1, 2), torch.zeros(1, dtype=torch.int64))
module, api = ModuleSuspect(torch.nn.Linear(2, 3)), CallableSuspect(lambda x: x, name="api")
web = HttpSuspect("http://localhost/predict")
"""
RIGHT = [
    "gradient(module); ask(module); ask(api); ask(web)",
    "verdict: Verdict = verify(mark, key, api, pool)",
    "verify(mark, key, module, pool, access='white')",
    "ask(open_suspect('model.pt2'))",
    "scheme: Scheme = FilterGradient()",
    "loss: torch.Tensor = Marker(FilterGradient(), key, spec).penalty(torch.nn.Linear(2, 3), pool)",
    "suspect = open_suspect('m.pt2')\nif isinstance(suspect, WhiteBox):\n    gradient(suspect)",
]
WRONG = [
    ("gradient(api)", "arg-type"),
    ("gradient(web)", "arg-type"),
    ("gradient(open_suspect('http://localhost'))", "arg-type"),
    ("api.vjp(torch.zeros(1, 2), torch.zeros(1, 3))", "attr-defined"),
    ("verify(mark, key, lambda x: x, pool)", "arg-type"),
    ("verify(mark, key, torch.nn.Linear(2, 3), pool)", "arg-type"),
    ("verify(mark, b'secret', module, pool)", "arg-type"),
    ("verify(mark, key, module, pool, access='grey')", "arg-type"),
    ("verify(mark, key, module, pool, 1e-6)", "call-arg|misc|positional"),
    ("ModelSpec('video', (2,), 3)", "arg-type"),
    ("MarkFile.create(key, 'filter-gradient', {}, spec, 't-test', 10)", "arg-type"),
    ("FilterGradient().bits = 3", "misc"),
    ("verify(mark, key, module, pool).outcome = 'owned'", "misc"),
    ("attack: Attack = FilterGradient()", "assignment"),
    ("if verify(mark, key, module, pool).outcome == 'yes':\n    pass", "comparison-overlap"),
]


@pytest.fixture(scope="module")
def findings(root: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What mypy says of each snippet; one run for all of them."""
    folder = tmp_path_factory.mktemp("typing")
    snippets = [*RIGHT, *(code for code, _ in WRONG)]
    for number, code in enumerate(snippets):
        (folder / f"snippet_{number}.py").write_text(HEAD + "\n" + code + "\n")
    before = os.environ.get("MYPYPATH")
    os.environ["MYPYPATH"] = str(root / "src")
    try:
        options = ["--strict", "--no-error-summary", "--hide-error-context"]
        options += ["--follow-imports", "silent", "--config-file", str(root / "pyproject.toml")]
        files = [str(folder / f"snippet_{number}.py") for number in range(len(snippets))]
        out, err, _ = mypy.run([*options, *files])
    finally:
        os.environ.pop("MYPYPATH") if before is None else os.environ.update(MYPYPATH=before)
    assert not err, err
    lines = [line for line in out.splitlines() if "error:" in line]
    return {
        code: "\n".join(line for line in lines if f"snippet_{number}.py:" in line)
        for number, code in enumerate(snippets)
    }


@pytest.mark.parametrize("code", RIGHT)
def test_right_code_passes(findings: dict[str, str], code: str) -> None:
    assert findings[code] == ""


@pytest.mark.parametrize(("code", "kind"), WRONG)
def test_wrong_code_is_refused(findings: dict[str, str], code: str, kind: str) -> None:
    assert any(f"[{name}]" in findings[code] for name in kind.split("|")), findings[code] or "no error"
