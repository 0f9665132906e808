"""The training loop: the same result whether or not it was killed on the way."""

from __future__ import annotations

import importlib
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from conformance import KEY, SPECS, inputs, network, scheme_for
from gradmark.data import Split
from gradmark.embed import Marker, Progress, Recipe, accuracy_of, train
from gradmark.embed.train import augmented
from gradmark.errors import ModelError, ResumeError, UsageError

LOOP = importlib.import_module("gradmark.embed.train")  # the package has a function of that name
DATA = Split(*inputs("grey", 200, seed=0), SPECS["grey"])
RECIPE = Recipe(epochs=3, batch_size=50, augment="shift-flip", seed=4)


def fresh(seed: int = 0) -> nn.Module:
    body = network("grey", seed)
    return nn.Sequential(*body[:-1], nn.BatchNorm1d(64), nn.Dropout(0.2), body[-1])


def marker() -> Marker:
    return Marker(scheme_for("filter-gradient", "grey"), KEY, SPECS["grey"])


class Killed(Exception):
    pass


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize("kill_at", [3, 4, 9])
def test_a_killed_run_ends_as_one_that_wasnt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, optimizer: Any, kill_at: int
) -> None:
    monkeypatch.setattr(LOOP, "_SAVE_SECONDS", -1.0)
    recipe = Recipe(epochs=3, batch_size=50, optimizer=optimizer, augment="shift-flip", seed=4)
    whole = fresh()
    history = train(whole, DATA, recipe, marker=marker())

    def kill(progress: Progress) -> None:
        if progress.step == kill_at:
            raise Killed

    path = tmp_path / "checkpoint.pt"
    with pytest.raises(Killed):
        train(fresh(), DATA, recipe, marker=marker(), checkpoint=path, report=kill)
    resumed = fresh(seed=9)
    torch.rand(3)
    steps: list[int] = []
    again = train(
        resumed, DATA, recipe, marker=marker(), checkpoint=path, report=lambda p: steps.append(p.step)
    )
    assert steps == list(range(kill_at, 13))
    assert again == history
    pairs = zip(whole.state_dict().values(), resumed.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_what_an_accelerator_began_is_finished_without_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LOOP, "_SAVE_SECONDS", -1.0)
    path, away = tmp_path / "here.pt", tmp_path / "away.pt"
    history = train(fresh(), DATA, RECIPE, marker=marker(), checkpoint=path)
    with zipfile.ZipFile(path) as here, zipfile.ZipFile(away, "w") as there:
        for name in here.namelist():  # where every tensor says that it lay, in a word as long
            there.writestr(name, here.read(name).replace(b"\x03\0\0\0cpu", b"\x03\0\0\0xpu"))
    with pytest.raises(RuntimeError, match=r"(?i)xpu"):
        torch.load(away, weights_only=True)
    assert train(fresh(), DATA, RECIPE, marker=marker(), checkpoint=away) == history


def test_the_world_outside_stays() -> None:
    before = torch.get_rng_state()
    train(fresh(), DATA, RECIPE, marker=marker())
    assert torch.equal(before, torch.get_rng_state())


def test_progress_is_told_every_step() -> None:
    told: list[Progress] = []
    history = train(fresh(), DATA, RECIPE, marker=marker(), stage="marked", report=told.append)
    assert [p.step for p in told] == list(range(1, 13))
    assert {(p.stage, p.steps) for p in told} == {("marked", 12)}
    assert told[-1].mark is not None
    assert [row["step"] for row in history] == [4, 8, 12]
    assert {"task_loss", "accuracy", "match", "log10_p", "weight"} <= set(history[0])
    control = train(fresh(), DATA, RECIPE, stage="control")
    assert "match" not in control[0]


def test_a_foreign_checkpoint_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LOOP, "_SAVE_SECONDS", -1.0)
    path = tmp_path / "checkpoint.pt"
    train(fresh(), DATA, RECIPE, checkpoint=path)
    for stage, recipe in (("control", RECIPE), ("marked", Recipe(epochs=4, batch_size=50))):
        with pytest.raises(ResumeError, match="another run"):
            train(fresh(), DATA, recipe, stage=stage, checkpoint=path)
    with pytest.raises(ResumeError, match="another identity"):
        train(fresh(), DATA, RECIPE, checkpoint=path, identity="another key")
    whole = path.read_bytes()
    for content in (b"", b"text", whole[:200], whole[: len(whole) // 2]):
        path.write_bytes(content)
        with pytest.raises(ResumeError, match="can't be read"):
            train(fresh(), DATA, RECIPE, checkpoint=path)


def test_a_loss_that_explodes_is_refused() -> None:
    model = fresh()
    with torch.no_grad():
        next(model.parameters()).fill_(float("nan"))
    with pytest.raises(ModelError, match="not finite at step 0"):
        train(model, DATA, RECIPE)


@pytest.mark.parametrize(
    "more",
    [{"epochs": 0}, {"batch_size": 1}, {"lr": 0.0}, {"optimizer": "adam"}, {"augment": "cutmix"}],
)
def test_recipes_without_sense_are_refused(more: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        Recipe(**more)


def test_augmentation_moves_whole_images() -> None:
    """Every row of the batch is a shifted, perhaps mirrored, copy of its own image."""
    x, labels = inputs("colour", 30, seed=1)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        moved, same = augmented((x, labels), "shift-flip")
    assert same is labels
    assert moved.shape == x.shape
    for image, original in zip(moved, x, strict=True):
        candidates = []
        for picture in (original, original.flip(2)):
            padded = nn.functional.pad(picture, (2,) * 4)
            candidates += [padded[:, i : i + 16, j : j + 16] for i in range(5) for j in range(5)]
        assert any(torch.equal(image, candidate) for candidate in candidates)
    assert augmented((x, labels), "none")[0] is x
    vector = inputs("vector", 5, seed=0)
    assert augmented(vector, "shift")[0] is vector[0]


def test_accuracy_leaves_the_mode_alone() -> None:
    model = fresh().train()
    right, n = accuracy_of(model, DATA, batch=33)
    model.eval()
    with torch.no_grad():
        assert right == int((model(DATA.x).argmax(1) == DATA.y).sum())
    assert n == 200
    model.train()
    accuracy_of(model, DATA)
    assert all(part.training for part in model.modules())
