"""A last layer trained anew while the mark goes in: when it is asked, what it leaves alone, and what for."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from conformance import KEY, SPECS, inputs
from gradmark import catalog
from gradmark.data import Split
from gradmark.embed import Marker, Recipe, train
from gradmark.embed.heads import NewHead, output_layer
from gradmark.ensemble import Ensemble
from gradmark.protocols import Thief
from gradmark.schemes.class_contrast import ClassContrast
from gradmark.stats import run_test
from gradmark.suspects import ModuleSuspect
from gradmark.views import Classification, View
from test_marker import Noisy, loop

X, Y = inputs("vector", 256, seed=0)
BATCH = X[:64], Y[:64]


def net() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return nn.Sequential(nn.Linear(20, 48), nn.BatchNorm1d(48), nn.ReLU(), nn.Linear(48, 10))


def marker(**more: Any) -> Marker:
    return Marker(Ensemble((ClassContrast(bits=40),)), KEY, SPECS["vector"], every=1, seed=5, **more)


def asked(head: NewHead, model: nn.Module, times: int) -> list[int]:
    return [i for i in range(1, times + 1) if head.through(model, BATCH) is not None]


def test_every_other_penalty_of_the_second_half_of_its_life() -> None:
    assert asked(NewHead(0), net(), 64) == [*range(16, 32, 2), *range(48, 64, 2)]


def test_the_model_answers_through_it_for_the_length_of_the_block() -> None:
    model, head = net().eval(), NewHead(0)
    own = model(X[:5])
    while (block := head.through(model, BATCH)) is None:
        pass
    with block:
        through = model(X[:5])
        through.square().sum().backward()
    assert not torch.allclose(through, own)
    assert torch.equal(model(X[:5]), own)
    assert model[3].weight.grad is None
    assert model[0].weight.grad.abs().max() > 0
    right = (through.argmax(1) == Y[:5]).float().mean()
    assert right > 0.2  # it has learnt something in its 32 steps


def test_training_it_leaves_the_model_and_the_random_state_alone() -> None:
    model = net()
    before, state = copy.deepcopy(model.state_dict()), torch.random.get_rng_state()
    with torch.no_grad():
        model.eval()
        asked(NewHead(0), model, 40)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("labels", [Y[:64].float(), torch.zeros(64, 3)])
def test_no_head_without_classes(labels: Tensor) -> None:
    head, model = NewHead(0), net()
    assert not any(head.through(model, (X[:64], labels)) for _ in range(40))


def test_no_head_where_the_model_does_not_end_in_a_linear_layer() -> None:
    soft = nn.Sequential(net(), nn.Softmax(1))
    assert output_layer(soft, X[:2]) is None
    assert asked(NewHead(0), soft, 40) == []
    assert asked(NewHead(0), View(Classification("v", lambda: None, net), net()), 40) == []
    assert isinstance(output_layer(Noisy(), X[:2]), nn.Linear)


def test_a_resumed_run_goes_on_to_the_same_penalties() -> None:
    whole, first, again = (marker(margin=0.02, strength=1.0) for _ in range(3))  # a margin that is soon met
    expected, other = loop(net(), whole, 70), net()
    assert whole.head is not None
    assert whole.head.age > 32
    assert loop(other, first, 41) == expected[:41]
    again.load_state_dict(first.state_dict())
    assert loop(other, again, 29, start=41) == expected[41:]


def test_a_state_that_was_only_loaded_is_saved_whole() -> None:
    """Interrupted again before the head was asked: its layer must not be lost."""
    head, model = NewHead(0), net()
    asked(head, model, 5)
    for _ in range(2):
        again = NewHead(0)
        again.load_state_dict(head.state_dict())
        head = again
    assert head.state_dict()["layer"].keys() == {"weight", "bias"}
    assert asked(head, model, 20)  # and it can be asked
    assert head.age == 25


def test_the_models_own_last_layer_comes_first() -> None:
    """While most of the margin is unmet in it, no penalty goes through another."""
    far = marker(margin=50.0)
    loop(net(), far, 40)
    assert far.head is not None
    assert far.head.age == 0


def test_who_trains_the_last_layer_anew_keeps_the_mark() -> None:
    """RTLL on two networks that differ in this alone: the evidence left is far greater with it."""
    left = {}
    for new_heads in (False, True):
        torch.manual_seed(0)
        model = net()
        rider = marker(new_heads=new_heads, strength=1.0)
        train(model, Split(X, Y, SPECS["vector"]), Recipe(epochs=120), marker=rider)
        thief = Thief(SPECS["vector"], X[:96], Y[:96], fresh=net, lr=0.05)
        stolen = catalog.attack("rtll", {"epochs": 20}).run(model, thief, torch.Generator().manual_seed(1))
        read = rider.scheme.read(
            rider.mark, ModuleSuspect(stolen.eval()), (X, Y), access="white", carriers=200
        )
        left[new_heads] = run_test("signed-rank", (read.values * read.bits).numpy()).log10_p
    assert left[True] < left[False] - 2, left
