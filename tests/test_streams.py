"""Every channel without a name renamed, streams included: the function stays, and what has a name stays."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradmark.bench.networks import Block, DigitsNet, ResNet, WideBlock
from gradmark.streams import orders, rename

X = torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
GREY = torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def lived(model: nn.Module) -> nn.Module:
    torch.manual_seed(1)
    for part in model.modules():
        if isinstance(part, nn.BatchNorm2d):
            for value in (*part.parameters(), part.running_mean, part.running_var):
                assert value is not None
                nn.init.uniform_(value, 0.5, 2.0)
    return model.eval()


class Odd(nn.Module):
    """A stream that something unknown looks into: two of its channels, by their place."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.block = nn.Conv2d(3, 8, 3), Block(8, 8, 1)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.block(self.stem(2.0 * x - 1.0))
        scores: Tensor = self.head(x.mean((2, 3))) + x[:, :1].mean((2, 3))
        return scores


class Tokens(nn.Module):
    """Feed-forward layers beside a stream of features, without anything to find channels' places by."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.up, self.down = nn.Linear(16, 12), nn.Linear(12, 20), nn.Linear(20, 12)
        self.head = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.into(x[:, 0])
        x = x + self.down(F.gelu(self.up(x)))
        scores: Tensor = self.head(x).mean(1)
        return scores


def wide() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, 1, 1),
        *(WideBlock(8, 16, 2), WideBlock(16, 16, 1)),
        *(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(64, 10)),
    )


CASES: list[tuple[Any, Tensor]] = [
    (lambda: ResNet(1), X),
    (wide, X),
    (DigitsNet, GREY),
    (Odd, X),
    (Tokens, X),
]


@pytest.mark.parametrize(("make", "x"), CASES)
def test_the_function_stays_and_the_weights_dont(make: Any, x: Tensor) -> None:
    model = lived(make())
    found = orders(model, x, torch.Generator().manual_seed(0))
    twin = copy.deepcopy(model)
    rename(twin, found)
    torch.testing.assert_close(twin(x), model(x), rtol=1e-4, atol=1e-4)
    assert any(not torch.equal(a, b) for a, b in zip(twin.parameters(), model.parameters(), strict=True))
    for slot, order in found.items():
        assert sorted(order.tolist()) == list(range(len(order))), slot
    again = orders(model, x, torch.Generator().manual_seed(0))
    assert all(torch.equal(order, again[slot]) for slot, order in found.items())


def moved(model: nn.Module, x: Tensor) -> dict[tuple[str, str], float]:
    """The share of places that some seed gives to another channel."""
    share: dict[tuple[str, str], Tensor] = {}
    for seed in range(5):
        for slot, order in orders(model, x, torch.Generator().manual_seed(seed)).items():
            share[slot] = share.get(slot, torch.zeros(len(order))) + (order != torch.arange(len(order)))
    return {slot: float((n > 0).float().mean()) for slot, n in share.items()}


def test_all_of_a_residual_network_moves_but_pixels_and_classes() -> None:
    for model in (ResNet(1), wide()):
        found = moved(lived(model), X)
        names = {n for n, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}
        assert {name for name, axis in found if axis == "columns"} == names
        head = "head" if isinstance(model, ResNet) else "5"
        first = "conv" if isinstance(model, ResNet) else "0"
        for slot, share in found.items():
            assert share == 0 if slot in ((first, "columns"), (head, "rows")) else share > 0.9, slot


def test_what_isnt_understood_stays() -> None:
    found = moved(lived(Odd()), X)
    assert found["stem", "rows"] == found["block.conv2", "rows"] == 0
    assert found["block.conv1", "rows"] > 0.9, "hidden in the block"


def test_a_stream_of_tokens_moves() -> None:
    found = moved(Tokens(), X)
    assert found["into", "rows"] > 0.9
    assert found["up", "rows"] > 0.9
    assert found["head", "columns"] == found["into", "rows"]
    assert found["head", "rows"] == 0
