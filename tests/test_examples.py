"""The examples run, end in a verdict, and draw."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch

NAMES: dict[str, dict[str, Any]] = {
    "tabular": {},
    "faces": {"synthetic": True},
    "spoken_words": {},
    "speech_recognition": {},
    "text_classification": {"small": True},
    "language_model": {"small": True},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_example(name: str, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(root / "examples" / "domains")
    picture = tmp_path / f"{name}.png"
    with torch.random.fork_rng():
        found = importlib.import_module(name).main(picture, **NAMES[name])
    assert len(found) >= 4
    for who, verdict in found.items():
        ours = who.startswith(("owner, marked", "signed"))
        assert verdict.outcome == ("owned" if ours else "no-evidence"), (who, verdict)
    assert picture.read_bytes().startswith(b"\x89PNG")
