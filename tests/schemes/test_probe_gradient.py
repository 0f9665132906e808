"""Readings at secret inputs against plain autograd, one bit at a time."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from conformance import KEY, SPECS, Counting, network, pool, white
from gradmark.errors import UsageError
from gradmark.schemes.probe_gradient import ProbeGradient


@pytest.mark.parametrize("domain", list(SPECS))
def test_white_box_reading_equals_autograd(domain: str) -> None:
    spec, scheme = SPECS[domain], ProbeGradient(bits=20, inputs=6)
    mark, model = scheme.mark(KEY, spec), network(domain, activation=nn.Tanh)
    assert len(mark.inputs.flatten(1).unique(dim=0)) == 6
    assert torch.equal(mark.inputs, spec.snap(mark.inputs))
    torch.testing.assert_close(mark.contrasts.sum(1), torch.zeros(20), atol=1e-6, rtol=0)
    reading = scheme.read(mark, white(model), pool(domain), access="white", carriers=1)
    for j in range(20):
        x = mark.inputs[j : j + 1].clone().requires_grad_()
        (gradient,) = torch.autograd.grad((model(x) * mark.contrasts[j]).sum(), x)
        assert float((gradient[0] * mark.directions[j]).sum()) == pytest.approx(
            float(reading.values[j]), rel=1e-3, abs=1e-6
        )


def test_bits_beyond_the_budget_are_ties() -> None:
    scheme = ProbeGradient(bits=20, inputs=6)
    suspect = Counting(network("grey"))
    reading = scheme.read(
        scheme.mark(KEY, SPECS["grey"]), suspect, pool("grey"), access="black", carriers=1, queries=15
    )
    assert (suspect.count, int((reading.values != 0).sum()), reading.carriers) == (14, 7, 6)
    with pytest.raises(UsageError):
        ProbeGradient(inputs=0).mark(KEY, SPECS["grey"])
