"""Two processes on gloo come to the gradients, the weights and the verdict of one."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import ranked
from conformance import KEY, mark_file, network, pool, white
from gradmark.verify import verify

WRONG = 1e-5
REFUSED = {"fsdp1": ("FSDP1", "fully_shard"), "ddp-reentrant": ("reentrant", "non-reentrant checkpointing")}
RIGHT = [case for case in ranked.CASES if case not in REFUSED]


def start(folder: Path, cases: list[str], size: int = 2) -> None:
    """Run ``cases`` on ``size`` processes of this machine."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    here = Path(ranked.__file__)
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(size)}
    path = os.pathsep.join([str(here.parent), *(p for p in sys.path if p)])
    runs = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", str(here), str(folder), *cases],
            env={**os.environ, **common, "RANK": str(rank), "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(size)
    ]
    try:
        said = [run.communicate(timeout=300)[0] for run in runs]
    finally:
        for run in runs:
            run.kill()
    assert [run.returncode for run in runs] == [0] * size, "\n".join(said)


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All cases, in one start of two processes."""
    folder = tmp_path_factory.mktemp("ranks")
    start(folder, list(ranked.CASES))
    return folder


def both(folder: Path, case: str) -> list[dict[str, Any]]:
    return [torch.load(folder / f"{case}-{rank}.pt", weights_only=True) for rank in range(2)]


def worst(a: list[torch.Tensor], b: list[torch.Tensor]) -> float:
    """Greatest difference, relative to the greatest number of the tensor."""
    pairs = zip(a, b, strict=True)
    return max(float((p - q).abs().max() / q.abs().max().clamp_min(1e-3)) for p, q in pairs)


@pytest.mark.parametrize("case", RIGHT)
def test_gradients_and_weights_are_those_of_one_process(done: Path, case: str, record_property: Any) -> None:
    alone = ranked.run(case, 0, 1)
    for name in ("gradients", "weights"):
        record_property(name, max(worst(found[name], alone[name]) for found in both(done, case)))
    for found in both(done, case):
        assert worst(found["gradients"], alone["gradients"]) < WRONG
        assert worst(found["weights"], alone["weights"]) < 10 * WRONG  # after a dozen steps
        assert found["method"] == alone["method"]


@pytest.mark.parametrize("case", RIGHT)
def test_processes_stay_in_step(done: Path, case: str) -> None:
    """Bit for bit: the running state decides what is pushed, so it must not drift apart."""
    first, second = (found["state"] for found in both(done, case))
    assert torch.equal(first["readings"], second["readings"])
    assert torch.equal(first["generator"], second["generator"])
    assert first["numbers"] == second["numbers"]


@pytest.mark.parametrize("case", ["ddp", "fsdp2"])
def test_the_verdict_is_that_of_one_process(done: Path, case: str) -> None:
    verdicts = []
    for weights in (both(done, case)[0]["weights"], ranked.run(case, 0, 1)["weights"]):
        model = network("vector")
        for own, trained in zip(model.parameters(), weights, strict=True):
            own.data.copy_(trained)
        mark = mark_file("filter-gradient", "vector")
        verdicts.append(verify(mark, KEY, white(model), pool("vector"), access="white"))
    a, b = verdicts
    assert (a.outcome, a.n_match) == (b.outcome, b.n_match)
    assert a.log10_p == pytest.approx(b.log10_p, abs=0.05)


@pytest.mark.parametrize("case", REFUSED)
def test_what_cant_be_right_is_refused_with_the_reason(done: Path, case: str, record_property: Any) -> None:
    record_property("refusal", both(done, case)[0]["refused"])
    for found in both(done, case):
        assert all(word in found["refused"] for word in REFUSED[case])
