"""What only an accelerator shows: kernels that a CPU doesn't have. Skipped where there is none."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import strange
from conformance import KEY, SPECS, network, scheme_for
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
