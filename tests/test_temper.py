"""A temperature folded into the last layer: confidence as wanted, predictions and evidence as before."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from gradmark.bench.networks import DigitsMLP, DigitsNet
from gradmark.data import load_data
from gradmark.embed.temper import confidence_of, temper
from gradmark.errors import ModelError

TRAIN = load_data("digits").to_train()
X = TRAIN.batch(slice(0, 50))[0]


class Probabilities(nn.Module):
    """A model that ends in no layer with weights."""

    def __init__(self) -> None:
        super().__init__()
        self.body = DigitsMLP()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(x).softmax(1)


@pytest.mark.parametrize("net", [DigitsNet, DigitsMLP])
@pytest.mark.parametrize("wanted", [0.3, 0.95])
def test_confidence_is_as_wanted_and_nothing_else_moves(net: type[nn.Module], wanted: float) -> None:
    torch.manual_seed(0)
    model = net().train()
    before = copy.deepcopy(model).eval()(X)
    factor = temper(model, TRAIN, wanted)
    assert model.training, "the mode is the caller's"
    assert confidence_of(model, TRAIN) == pytest.approx(wanted, abs=1e-3)
    assert torch.allclose(model.eval()(X), factor * before, rtol=1e-4, atol=1e-5)
    assert torch.equal(model(X).argmax(1), before.argmax(1))


def test_where_there_is_no_such_layer_or_confidence_the_reason_is_given() -> None:
    with pytest.raises(ModelError, match="no layer to go into"):
        temper(Probabilities(), TRAIN, 0.5)
    with pytest.raises(ModelError, match="No temperature"):
        temper(DigitsMLP(), TRAIN, 0.01)


def test_a_layer_whose_weights_work_elsewhere_too_is_refused() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(64, 64), nn.Linear(64, 64)
            self.two.weight = self.one.weight

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            found: torch.Tensor = self.two(self.one(x.flatten(1)).relu())
            return found

    with pytest.raises(ModelError, match="weights of its own"):
        temper(Tied(), TRAIN, 0.5)
