"""On an accelerator all is as on the CPU; shown on a pretended one, as few machines have another."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from commandline import gradmark, refused
from conformance import SPECS, inputs, network, scheme_for
from gradmark import Marker, OwnerKey, catalog
from gradmark.bench.attacks import Configured, standard
from gradmark.bench.cells import networks_of, run_unit
from gradmark.bench.experiment import find_experiment
from gradmark.bench.store import obtain
from gradmark.bench.suite import Entry, Suite, Unit
from gradmark.data import Split
from gradmark.embed import Recipe, train
from gradmark.embed.temper import temper
from gradmark.views import accuracy_of
from pretend import There, pretended
from tiny import net

EVERY = standard(tune=1, extract=1)


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with the tiny task's networks."""
    folder = tmp_path_factory.mktemp("device")
    for wanted in networks_of(unit(EVERY[1])).values():
        obtain(wanted, folder / "networks")
    yield folder


def unit(attack: Configured) -> Unit:
    marked = Entry("filter-gradient", parameters={"bits": 16})
    suite = Suite(
        "device", ("benched:experiment",), (marked,), (attack,), seeds=(3,), queries=64, wrong_keys=1
    )
    return suite.units()[0]


def numbers(cells: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{k: v for k, v in cell.items() if "seconds" not in k} for cell in cells]


def test_the_pretended_device_is_strict() -> None:
    with pretended() as device:
        layer, x = torch.nn.Linear(3, 2).to(device), torch.rand(4, 3)
        assert isinstance(layer.weight, There)
        assert layer.weight.device.type == device
        with pytest.raises(RuntimeError, match="same device"):
            layer(x)
        with pytest.raises(RuntimeError, match="generator"):
            torch.rand(3, generator=torch.Generator(), device=device)
        assert torch.equal(layer(x.to(device)).detach().cpu(), layer.cpu()(x).detach())


@pytest.mark.parametrize("row", EVERY, ids=lambda row: row.label)
def test_every_attack_is_the_same_on_a_device(row: Configured, out: Path) -> None:
    here = run_unit(unit(row), out)
    with pretended() as device:
        there = run_unit(unit(row), out, device)
    assert numbers(there) == numbers(here)
    assert not any("same device" in cell.get("error", "") for cell in there)


@pytest.mark.parametrize("name", [*catalog.SCHEMES])
def test_every_scheme_trains_the_same_on_a_device(name: str) -> None:
    data = find_experiment("benched:experiment").data()

    def trained(device: str) -> tuple[Any, dict[str, torch.Tensor]]:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = net().to(device)
        marker = Marker(catalog.scheme(name), OwnerKey.from_seed(5), data.spec, seed=1)
        history = train(model, data.to_train(), Recipe(epochs=1, augment="shift-flip"), marker=marker)
        return (history, accuracy_of(model, data.test)), {k: v.cpu() for k, v in model.state_dict().items()}

    here, weights = trained("cpu")
    with pretended() as device:
        there, moved = trained(device)
    assert there == here
    assert all(torch.equal(value, moved[k]) for k, value in weights.items())


def test_thieves_and_softened_carriers_are_the_same_on_a_device() -> None:
    data = Split(*inputs("grey", 400, seed=0), SPECS["grey"])

    def trained(device: str) -> tuple[Any, dict[str, torch.Tensor]]:
        model = network("grey").to(device)
        scheme = scheme_for("class-contrast", "grey")
        marker = Marker(scheme, OwnerKey.from_seed(5), data.spec, seed=1, every=1, rehearse=0.01, soften=0.3)
        marker._begun = lambda: True  # type: ignore[method-assign]  # so few steps place nothing
        history = train(model, data, Recipe(epochs=2, batch_size=50), marker=marker)
        assert marker.rehearsal is not None
        assert marker.rehearsal.age > 12
        return history, {k: v.cpu() for k, v in model.state_dict().items()}

    here, weights = trained("cpu")
    with pretended() as device:
        there, moved = trained(device)
    assert there == here
    assert all(torch.equal(value, moved[k]) for k, value in weights.items())


def test_networks_are_trained_on_the_device(tmp_path: Path) -> None:
    wanted = networks_of(unit(EVERY[0]))["marked"]
    obtain(wanted, tmp_path / "here")
    with pretended() as device:
        assert isinstance(next(obtain(wanted, tmp_path / "there", device=device).parameters()), There)
    for name in (f"{wanted.name}.safetensors", f"{wanted.name}.mark.json"):
        if (tmp_path / "here" / name).exists():
            assert (tmp_path / "here" / name).read_bytes() == (tmp_path / "there" / name).read_bytes()
    here, there = (json.loads((tmp_path / w / f"{wanted.name}.json").read_text()) for w in ("here", "there"))
    assert {**here, "seconds": 0} == {**there, "seconds": 0}


def test_a_temperature_is_the_same_on_a_device() -> None:
    data = find_experiment("benched:experiment").data().to_train()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = net()
    train(model, data, Recipe(epochs=1))
    factor = temper(copy.deepcopy(model), data, 0.99)
    with pretended() as device:
        assert temper(copy.deepcopy(model).to(device), data, 0.99) == factor


def test_a_device_that_is_not_there_is_refused(tmp_path: Path) -> None:
    for name in ("cuda:63", "abacus"):
        done = gradmark("bench", "digits-quick", "--out", tmp_path / "out", "--device", name)
        refused(done, "no such device")


class OnTwo(torch.nn.Module):
    """A network whose last layer lies on another device than the others."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = torch.nn.Linear(64, 32), torch.nn.Linear(32, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.first(x.flatten(1)).relu().to(self.last.weight.device)
        scores: torch.Tensor = self.last(hidden).to(x.device)
        return scores


def test_a_model_on_two_devices_carries_the_mark_as_it_does_on_one() -> None:
    penalties = []
    for split in (False, True):
        with torch.random.fork_rng(devices=[]), pretended() as device:
            torch.manual_seed(0)
            model = OnTwo()
            if split:
                model.last.to(device)
            marker = Marker(scheme_for("ensemble", "grey"), OwnerKey.from_seed(1), SPECS["grey"], every=1)
            penalties.append(float(marker.penalty(model, inputs("grey", 32, seed=0)).detach()))
    assert penalties[0] == pytest.approx(penalties[1], rel=1e-5)
