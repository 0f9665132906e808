"""A short run of ``benchmarks/fuzz.py``: hostile files give typed errors and nothing else."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

MUTANTS = 400


def load() -> ModuleType:
    path = Path(__file__).resolve().parents[1] / "benchmarks" / "fuzz.py"
    spec = importlib.util.spec_from_file_location("gradmark_fuzz", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look it up
    spec.loader.exec_module(module)
    return module


FUZZ = load()


@pytest.mark.parametrize("name", list(FUZZ.FORMATS))
def test_mutants_give_typed_errors_alone(name: str) -> None:
    outcomes, untyped = FUZZ.fuzz(name, MUTANTS, seed=1)
    assert untyped == []
    assert sum(outcomes.values()) == MUTANTS
    refused = MUTANTS - outcomes["accepted"]
    assert refused > MUTANTS / 3  # licensees may be called nearly anything


def test_an_untyped_error_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    def careless(data: bytes) -> None:
        if data != good:
            raise KeyError("oops")

    good = b'{"a":[1,2]}'
    monkeypatch.setitem(FUZZ.FORMATS, "careless", FUZZ.Format((good,), careless, FUZZ.dumps))
    outcomes, untyped = FUZZ.fuzz("careless", 50)
    assert outcomes["UNTYPED KeyError"] == len(untyped) > 0
