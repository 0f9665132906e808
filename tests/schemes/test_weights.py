"""Marks in weights: which layer, its projection, and what is refused."""

from __future__ import annotations

import pytest
import torch

from conformance import KEY, SPECS, network, pool, white
from gradmark.errors import MismatchError, UsageError
from gradmark.schemes.weights import Weights

SPEC = SPECS["colour"]
MODEL = network("colour")  # a convolution of 27 entries a filter, matrices of 1024 and 64


def read(scheme: Weights) -> torch.Tensor:
    mark = scheme.mark(KEY, SPEC)
    return scheme.read(mark, white(MODEL), pool("colour"), access="white", carriers=1).values


@pytest.mark.parametrize(
    ("layers", "bits", "used"),
    [((), 64, [4]), ((), 20, [4]), ((), 2000, [4]), (("0.*",), 64, [0]), (["0.weight", "6.*"], 64, [0, 6])],
)
def test_the_layers_filters_are_averaged_and_projected(
    layers: tuple[str, ...], bits: int, used: list[int]
) -> None:
    scheme = Weights(bits, layers)
    mean = torch.cat([MODEL[i].weight.detach().flatten(1).mean(0).double() for i in used])
    expected = scheme.mark(KEY, SPEC).projection(len(mean)) @ mean
    torch.testing.assert_close(read(scheme), expected, rtol=1e-5, atol=1e-7)
    signed, index = scheme.probe(scheme.mark(KEY, SPEC), MODEL, pool("colour"), torch.Generator(), "exact")
    torch.testing.assert_close(
        signed[0].double().detach(), expected * scheme.mark(KEY, SPEC).bits, rtol=1e-4, atol=1e-5
    )
    assert index.tolist() == [list(range(bits))]


def test_missing_and_reshaped_layers_are_named() -> None:
    with pytest.raises(MismatchError, match=r"layer is missing.*head\.\*"):
        read(Weights(layers=("0.*", "head.*")))
    with pytest.raises(MismatchError, match="another shape"):
        read(Weights(length=5))
    assert len(read(Weights(length=1024))) == 64
    with pytest.raises(UsageError):
        Weights(bits=0).mark(KEY, SPEC)


def test_a_mean_that_hardly_varies_does_not_make_the_penalty_stiff() -> None:
    """A softmax's head has a mean of zero over its classes: its own variance would be a wall."""
    torch.manual_seed(0)
    head = torch.nn.Linear(40, 10)
    with torch.no_grad():
        head.weight -= head.weight.mean(0)
    scheme = Weights(8, ("*",)).calibrated(KEY, SPEC, white(head), pool("colour"))
    mark, moved = scheme.mark(KEY, SPEC), 0.1 * float(head.weight.detach().std()) / 10**0.5
    with torch.no_grad():
        assert float(scheme.distortion(mark, head)) < 1e-3
        head.weight += moved
        # a tenth of the spread of independent weights' mean: its square over a hundredth, halved by two rows
        assert float(scheme.distortion(mark, head)) == pytest.approx(0.5, rel=0.1)
