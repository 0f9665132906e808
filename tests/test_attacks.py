"""Every attack in the catalog: a new model, the old one untouched, and nothing left to chance."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from conformance import SPECS, inputs, network, same_world, scheme_for, world
from gradmark import catalog
from gradmark.embed import Marker
from gradmark.errors import UnknownNameError
from gradmark.keys import OwnerKey
from gradmark.protocols import Thief
from gradmark.suspects.module import weights_digest

GUARDS = {name for name in catalog.ATTACKS if name.startswith(("input-", "output-", "detect-"))}
RENAMED = {"fold", *GUARDS}
"""They take modules away, or put the model into another."""


def victim(seed: int = 0) -> nn.Module:
    body = network("grey", seed)
    return nn.Sequential(*body[:-2], nn.BatchNorm1d(64), body[-2], nn.Dropout(0.5), body[-1]).train()


def marker(seed: int) -> Marker:
    return Marker(scheme_for("filter-gradient", "grey"), OwnerKey.from_seed(seed), SPECS["grey"])


THIEF = Thief(
    SPECS["grey"],
    *inputs("grey", 120, seed=0),
    sibling=victim(9).eval(),
    fresh=victim,
    other=victim,
    surrogate=inputs("grey", 120, seed=5)[0],
    marker=marker,
    batch_size=40,
)


def run(name: str, model: nn.Module, seed: int = 0) -> nn.Module:
    if name == "torchao-int8":
        pytest.importorskip("torchao")
    if name == "lora":
        pytest.importorskip("peft")
    return catalog.attack(name).run(model, THIEF, torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", list(catalog.ATTACKS))
def test_an_attack_leaves_the_victim_and_the_world_alone(name: str) -> None:
    model = victim()
    before = world(model)
    attacked = run(name, model)
    assert same_world(before, world(model))
    assert attacked is not model
    assert not attacked.training
    if name not in RENAMED:
        assert list(attacked.state_dict()) == list(model.state_dict())
    assert weights_digest(attacked) != weights_digest(model)


@pytest.mark.parametrize("name", list(catalog.ATTACKS))
def test_an_attack_follows_from_its_generator(name: str) -> None:
    model = victim()
    first = run(name, model)
    torch.rand(7)
    again = run(name, model)
    assert weights_digest(first) == weights_digest(again)


def test_dropout_draws_from_the_generator() -> None:
    model = victim()
    a, b = (run("finetune", model, seed).state_dict() for seed in (1, 2))
    assert not torch.equal(a["0.weight"], b["0.weight"])


@pytest.mark.parametrize("fraction", [0.0, 0.5, 0.9])
def test_pruning_takes_the_smallest_weights(fraction: float) -> None:
    model = victim()
    pruned = catalog.attack("prune", {"fraction": fraction}).run(model, THIEF, torch.Generator())
    pairs = [(m.weight, p.weight) for m, p in zip(model.modules(), pruned.modules(), strict=True) if layer(m)]
    old = torch.cat([a.flatten().detach() for a, _ in pairs])
    new = torch.cat([b.flatten().detach() for _, b in pairs])
    gone = new == 0
    assert float(gone.double().mean()) == pytest.approx(fraction, abs=1e-3)
    assert torch.equal(old[~gone], new[~gone])
    if fraction:
        assert float(old[gone].abs().max()) <= float(old[~gone].abs().min())


def layer(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear | nn.Conv2d)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_quantising_leaves_few_values(bits: int) -> None:
    model = victim()
    coarse = catalog.attack("quantize", {"bits": bits}).run(model, THIEF, torch.Generator())
    for old, new in zip(model.modules(), coarse.modules(), strict=True):
        if layer(old):
            assert len(new.weight.unique()) <= 2**bits - 1
            unit = float(old.weight.detach().abs().max()) / (2 ** (bits - 1) - 1)
            assert float((old.weight - new.weight).detach().abs().max()) <= 0.5001 * unit


def test_unknown_names_get_a_hint() -> None:
    with pytest.raises(UnknownNameError, match="'prune'"):
        catalog.attack("prun")
    with pytest.raises(UnknownNameError, match="'filter-gradient'"):
        catalog.scheme("filtergradient")
