"""The examples run, end in a verdict, and draw."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest

NAMES: dict[str, dict[str, Any]] = {"tabular": {}, "faces": {"synthetic": True}, "speech": {}}


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_example(name: str, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(root / "examples")
    picture = tmp_path / f"{name}.png"
    found = importlib.import_module(name).main(picture, **NAMES[name])
    assert len(found) >= 6
    for who, verdict in found.items():
        ours = who.startswith("owner, marked")
        assert verdict.outcome == ("owned" if ours else "no-evidence"), (who, verdict)
    assert picture.read_bytes().startswith(b"\x89PNG")
