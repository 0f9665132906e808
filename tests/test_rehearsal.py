"""Thieves rehearsed while the mark goes in: what they leave alone, where their penalty goes, and what for."""

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
from gradmark.embed.rehearsal import Rehearsal, Retrained
from gradmark.ensemble import Ensemble
from gradmark.errors import ModelError, UsageError
from gradmark.protocols import Thief
from gradmark.schemes.class_contrast import ClassContrast
from gradmark.schemes.trigger import Trigger
from gradmark.stats import run_test
from gradmark.suspects import ModuleSuspect
from gradmark.views import Classification, View
from test_marker import loop

X, Y = inputs("vector", 256, seed=0)
BATCH = X[:64], Y[:64]
RATE = 0.01


def net() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return nn.Sequential(
            nn.Linear(20, 48), nn.BatchNorm1d(48), nn.ReLU(), nn.Dropout(0.1), nn.Linear(48, 10)
        )


def scheme() -> Ensemble:
    return Ensemble((ClassContrast(bits=40),))


def marker(**more: Any) -> Marker:
    return Marker(scheme(), KEY, SPECS["vector"], every=1, seed=5, **more)


def rehearsal(rate: float = RATE) -> Rehearsal:
    return Rehearsal(scheme().mark(KEY, SPECS["vector"]), rate, 0)


def asked(thieves: Rehearsal, model: nn.Module, times: int, ready: bool = True) -> list[int]:
    return [i for i in range(times) if thieves.step(model, BATCH, ready) is not None]


def settled(thieves: Rehearsal, model: nn.Module) -> Retrained:
    while (thief := thieves.step(model, BATCH, True)) is None:
        pass
    return thief


def test_every_other_step_of_a_copys_life_but_for_the_first() -> None:
    assert asked(rehearsal(), net(), 32) == [*range(2, 16, 2), *range(18, 32, 2)]


def test_it_waits_for_the_models_own_margins_and_then_lives_on() -> None:
    thieves, model = rehearsal(), net()
    assert asked(thieves, model, 50, ready=False) == []
    assert thieves.age == 0
    thieves.step(model, BATCH, True)
    assert asked(thieves, model, 60, ready=False)  # one that was begun
    assert thieves.age == 16


def test_thieves_leave_the_model_and_the_random_state_alone() -> None:
    model = net().train()
    before, state = copy.deepcopy(model.state_dict()), torch.random.get_rng_state()
    asked(rehearsal(), model, 60)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(p.grad is None for p in model.parameters())
    assert all(part.training for part in model.modules())


def test_a_copy_learns_the_task_with_another_last_layer() -> None:
    model, thieves = net(), rehearsal(0.02)
    while thieves.age < 15:
        thief = settled(thieves, model)
    assert not torch.allclose(thief.head.weight, model[4].weight, atol=0.05)
    assert (thief.model.eval()(X[:64]).argmax(1) == Y[:64]).float().mean() > 0.5
    while thieves.age % 16:
        thieves.step(model, BATCH, True)
    thieves.step(model, BATCH, True)  # the next one starts from the model again
    step = 1.01 * 0.02 * (1 + 5e-4)
    assert thieves._thief is not None
    first = thieves._thief.model[0].weight
    assert (first - model[0].weight).abs().max() < step
    assert (thief.model[0].weight - model[0].weight).abs().max() > 3 * step


def test_the_penalty_of_a_copy_is_carried_into_the_models_weights() -> None:
    """Against the copy's own gradient, which differs from the model's."""
    model, thieves = net(), rehearsal()
    model[0].bias.requires_grad_(False)
    thief = settled(thieves, model)

    def loss(of: nn.Module) -> Tensor:
        return of.eval()(X[:9]).square().mean()

    thief.carried(loss(thief.model), model).mul(3).backward()
    expected = torch.autograd.grad(loss(thief.model), thief.model[0].weight)[0]
    torch.testing.assert_close(model[0].weight.grad, 3 * expected)
    assert not torch.allclose(torch.autograd.grad(loss(model), model[0].weight)[0], expected, rtol=0.1)
    assert model[0].bias.grad is None
    assert model[4].weight.grad is None  # whose layer the thief threw away
    assert all(p.grad is None for p in thief.model.parameters())


def test_under_autocast_the_copy_is_asked_as_it_is_after_its_step() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        thief = settled(rehearsal(0.5), net())
        thief.model.eval()
        within = thief.model(X[:9])
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(thief.model(X[:9]), within)


def test_a_resumed_run_goes_on_to_the_same_penalties() -> None:
    more = {"margin": 0.02, "strength": 1.0, "rehearse": RATE}  # a margin that is soon met
    whole, first, again = (marker(**more) for _ in range(3))
    mute = net()
    mute[3].p = 0.0  # the loop's own dropout draws from the global state, wherever that is
    expected, other = loop(copy.deepcopy(mute), whole, 110), mute
    assert whole.rehearsal is not None
    assert whole.rehearsal.age > 72
    assert loop(other, first, 71) == expected[:71]
    again.load_state_dict(first.state_dict())
    assert loop(other, again, 39, start=71) == expected[71:]


def test_a_state_that_was_only_loaded_is_saved_whole() -> None:
    thieves, model = rehearsal(), net()
    asked(thieves, model, 30)
    resumed = thieves
    for _ in range(2):
        again = rehearsal()
        again.load_state_dict(resumed.state_dict())
        resumed = again
    one, other = resumed.step(model, BATCH, True), thieves.step(model, BATCH, True)
    assert one is not None
    assert other is not None
    for p, q in zip(one.model.parameters(), other.model.parameters(), strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize(
    ("model", "batch"),
    [
        (nn.Sequential(net(), nn.Softmax(1)), BATCH),
        (View(Classification("v", lambda: None, net), net()), BATCH),
        (net(), (X[:64], torch.zeros(64, 3))),
    ],
)
def test_what_has_no_last_layer_to_draw_anew_is_refused(model: nn.Module, batch: Any) -> None:
    with pytest.raises(UsageError, match="can't be rehearsed"):
        rehearsal().step(model, batch, True)


@pytest.mark.parametrize("rate", [0.0, -1.0, 1.0, float("nan")])
def test_a_rate_that_makes_no_sense(rate: float) -> None:
    with pytest.raises(UsageError, match="rate"):
        marker(rehearse=rate)


def test_a_copy_that_diverges_is_told_of() -> None:
    broken = net()
    with torch.no_grad():
        broken[0].weight.fill_(float("inf"))
    with pytest.raises(ModelError, match="diverged"):
        rehearsal().step(broken, BATCH, True)


def test_who_retrains_all_layers_at_the_owners_rate_keeps_the_mark() -> None:
    """RTAL by the owner's AdamW, three thieves each, on two networks that differ in this alone."""
    left, rate = {}, 0.005
    for rehearse in (None, rate):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(20, 96), nn.BatchNorm1d(96), nn.ReLU(), nn.Linear(96, 48), nn.ReLU(),
                              nn.Linear(48, 10))  # fmt: skip
        rider = Marker(
            Ensemble((Trigger(bits=48),)), KEY, SPECS["vector"], every=1, strength=1.0, rehearse=rehearse
        )
        train(model, Split(X, Y, SPECS["vector"]), Recipe(epochs=120), marker=rider)
        thief = Thief(SPECS["vector"], X[:96], Y[:96], fresh=net, lr=rate, optimizer="adamw", batch_size=32)
        found = []
        for i in range(3):
            stolen = catalog.attack("rtal", {"epochs": 10}).run(
                model, thief, torch.Generator().manual_seed(i)
            )
            read = rider.scheme.read(
                rider.mark, ModuleSuspect(stolen.eval()), (X, Y), access="white", carriers=200
            )
            found.append(run_test("signed-rank", (read.values * read.bits).numpy()).log10_p)
        left[rehearse] = sum(found) / len(found)
    assert left[rate] < left[None] - 1, left
