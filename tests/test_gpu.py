"""What only an accelerator shows: kernels that a CPU doesn't have. Skipped where there is none."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import strange
from conformance import KEY, SPECS, network, scheme_for
from gradmark.bench.attacks import standard
from gradmark.bench.cells import run_unit
from gradmark.bench.suite import Entry, Suite
from gradmark.embed import Marker, survey

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no accelerator here"),
]


def look(model: nn.Module, domain: str, wanted: str = "auto") -> Any:
    scheme = scheme_for("filter-gradient", domain)
    x, labels = strange.STEREO if domain == "stereo" else strange.VECTOR
    return survey(scheme, scheme.mark(KEY, SPECS[domain]), model.cuda(), (x.cuda(), labels.cuda()), wanted)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("method", ["central-difference", "exact"])
def test_flash_attention(dtype: torch.dtype, method: str) -> None:
    model = strange.seeded(lambda: strange.Frames(strange.Attention(), 32)).train()
    with torch.autocast("cuda", dtype):
        assert look(model, "stereo", method).method == method


@pytest.mark.parametrize("method", ["central-difference", "exact"])
def test_cudnn_rnn(method: str) -> None:
    model = strange.seeded(lambda: strange.Frames(nn.LSTM(32, 24, batch_first=True), 24)).train()
    told = look(model, "stereo", method)
    assert told.method == method
    assert any("cuDNN" in f.what for f in told.findings)


@pytest.mark.parametrize("compiled", [False, True])
def test_grad_scaler_in_float16(compiled: bool) -> None:
    model = network("vector").cuda()
    trained = torch.compile(model) if compiled else model
    marker = Marker(scheme_for("filter-gradient", "vector"), KEY, SPECS["vector"], every=1)
    optimizer, scaler = torch.optim.SGD(model.parameters(), 0.05), torch.amp.GradScaler("cuda")
    x, labels = (t.cuda() for t in strange.VECTOR)
    for _ in range(8):
        with torch.autocast("cuda", torch.float16):
            loss = F.cross_entropy(trained(x), labels) + marker.penalty(trained, (x, labels))
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
    assert all(bool(torch.isfinite(p).all()) for p in model.parameters())


@pytest.mark.parametrize(
    "label", ["none", "finetune-lr1", "overwrite", "lora", "input-jpeg", "detect-probes"]
)
def test_a_benchmark_is_made_there(label: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Trained, attacked and read on the accelerator: no error, and about the CPU's numbers."""
    folder = tmp_path_factory.getbasetemp() / "benchmark"
    (row,) = (row for row in standard(tune=1) if row.label == label)
    marked = Entry("filter-gradient", parameters={"bits": 16})
    suite = Suite("gpu", ("benched:experiment",), (marked,), (row,), seeds=(3,), queries=64, wrong_keys=1)
    there = run_unit(suite.units()[0], folder, "cuda")
    here = run_unit(suite.units()[0], folder)
    for a, b in zip(there, here, strict=True):
        assert "error" not in a
        assert a["utility_after"] == pytest.approx(b["utility_after"], abs=5)
        assert a["log10_p"] == pytest.approx(b["log10_p"], abs=1)
