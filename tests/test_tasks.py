"""Tasks: what a view of a model is, what an API is charged, and that all the rest works unchanged."""

from __future__ import annotations

import re
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from commandline import gradmark, refused
from gradmark import FilterGradient, Marker, MarkFile, OwnerKey, catalog, verify
from gradmark.data import Data, Split
from gradmark.embed import Recipe, train
from gradmark.errors import ModelError, UnknownNameError, UsageError
from gradmark.protocols import Batch, ModelSpec, Task, Utility, WhiteBox
from gradmark.suspects import CallableSuspect, ModuleSuspect
from gradmark.tasks.faces import Faces, Similarity, judged, split
from gradmark.thief import label_loss
from gradmark.views import Asked, Classification, View, suspected, unviewed, viewed

KEY = OwnerKey.from_seed(3, "Owner")
SPEC = ModelSpec("vector", (6,), 5)


@dataclass(frozen=True)
class Distances:
    """A toy whose models answer with points in the plane: scores are distances to fixed inputs' points."""

    name: str = "distances"
    price: int = 3
    entry: int = 5

    def data(self) -> Data:
        draw = torch.Generator().manual_seed(0)
        x = torch.randn(200, 6, generator=draw)
        splits = [Split(part, (part[:, 0] > 0).long(), SPEC) for part in x.split(100)]
        return Data(splits[0], splits[1], SPEC)

    def network(self) -> nn.Module:
        return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 2))

    def scores(self, model: Callable[[Tensor], Any], x: Tensor) -> Tensor:
        anchors = model(torch.eye(6)[:5].to(x))
        return -((model(x)[:, None] - anchors) ** 2).sum(2)

    def carriers(self, batch: Batch) -> Batch:
        x, y = batch
        return x[y > 0], y[y > 0] + 2

    def loss(self, model: nn.Module, batch: Batch, smoothing: float = 0.0) -> Tensor:
        return F.binary_cross_entropy_with_logits(model(batch[0])[:, 0], batch[1].float())

    def utility(self, model: nn.Module) -> Utility:
        x, y = self.data().test.all()
        return Utility(100 * float(((model(x)[:, 0] > 0).long() == y).float().mean()), len(y), {"halves": 2})


def test_a_view_is_the_model_seen_through_the_task() -> None:
    task, x = Distances(), torch.randn(4, 6)
    model = task.network()
    view = View(task, model)
    assert torch.equal(view(x), task.scores(model, x))
    assert {id(p) for p in view.parameters()} == {id(p) for p in model.parameters()}
    assert unviewed(nn.Sequential(view)) is model
    assert unviewed(model) is model
    assert not View(task, model.eval()).training
    model.train()[0].eval()  # as frozen batch norms are
    assert View(task, model).training
    assert not model[0].training
    assert label_loss(view, x, torch.ones(4)) == task.loss(model, (x, torch.ones(4)))


def test_a_suspect_is_seen_through_the_task_and_stays_white() -> None:
    task, x = Distances(), torch.randn(4, 6)
    model = task.network().eval()
    white = suspected(task, ModuleSuspect(model, name="theirs"))
    black = suspected(task, CallableSuspect(model, name="api"))
    assert isinstance(white, WhiteBox)
    assert not isinstance(black, WhiteBox)
    assert isinstance(black, Asked)
    assert white.name == "theirs"
    assert white.digest == ModuleSuspect(model).digest
    torch.testing.assert_close(white.query(x), black.query(x))
    moving = x.clone().requires_grad_()
    (wanted,) = torch.autograd.grad(task.scores(model, moving)[:, 1].sum(), moving)
    torch.testing.assert_close(white.vjp(x, F.one_hot(torch.ones(4).long(), 5).float()), wanted)


def test_an_api_is_asked_once_for_what_is_always_the_same() -> None:
    task = Distances()
    asked = Asked(task, CallableSuspect(task.network(), name="api"))
    for n in (4, 7):
        asked.query(torch.randn(n, 6))
    assert asked.sent == 4 + 7 + 5
    with pytest.raises(ModelError):
        Asked(
            Classification("c", task.data, task.network), CallableSuspect(lambda x: x[0], name="bad")
        ).query(torch.randn(3, 6))


def test_verify_counts_what_the_api_counts() -> None:
    task = Distances()
    scheme = FilterGradient(bits=12, step=0.2)
    mark = MarkFile.create(KEY, scheme.name, scheme.parameters(), SPEC, "sign", 50)
    pool = task.carriers(task.data().test.all())
    asked = Asked(task, CallableSuspect(task.network(), name="api"))
    for budget, used in ((100, 5 + 3 * 30), (4, 5), (17, 5 + 3 * 4)):
        verdict = verify(mark, KEY, asked, pool, queries=budget)
        assert verdict.queries == used
        assert all(n <= used for n, _ in (verdict.reading.history if verdict.reading else ()))


def test_a_mark_of_any_task_is_embedded_and_found() -> None:
    task = Distances()
    scheme = FilterGradient(bits=12, step=0.3)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = task.network()
    marker = Marker(scheme, KEY, SPEC, every=1, strength=1.0, margin=0.5)
    train(model, task.data().to_train(), Recipe(epochs=30, batch_size=50, lr=1e-2), marker=marker, task=task)
    mark = MarkFile.create(KEY, scheme.name, scheme.parameters(), SPEC, "sign", 50)
    pool = task.carriers(task.data().test.all())
    for suspect in (ModuleSuspect(model), CallableSuspect(model, name="api")):
        verdict = verify(mark, KEY, suspected(task, suspect), pool, alpha=1e-2)
        assert verdict.outcome == "owned", verdict
    assert task.utility(model).percent > 80


def test_nothing_can_ride_on_a_batch_without_carriers() -> None:
    task = Distances()
    marker = Marker(FilterGradient(bits=12, step=0.3), KEY, SPEC, every=1)
    assert float(marker.penalty(View(task, task.network()), (torch.randn(4, 6), torch.zeros(4)))) == 0


@pytest.mark.parametrize("name", sorted(catalog.TASKS))
def test_every_task_of_the_catalog(name: str, request: pytest.FixtureRequest) -> None:
    if name != "tabular":
        request.getfixturevalue("shared")
    task = catalog.task(name)
    assert isinstance(task, Task)
    assert task.name == name
    data, model = task.data(), task.network().eval()
    assert data.to_train().spec == data.test.spec == data.spec
    x, labels = task.carriers(data.test.batch(slice(0, 16)))
    assert x.shape == (len(labels), *data.spec.input_shape)
    assert labels.dtype == torch.int64
    assert 0 <= int(labels.min()) <= int(labels.max()) < data.spec.n_classes
    torch.testing.assert_close(data.spec.snap(x), x)
    scores = viewed(task, model)(x)
    assert scores.shape == (len(x), data.spec.n_classes)
    if data.spec.domain != "tokens":  # which have no derivative
        moving = x.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(viewed(task, model)(moving)[:, 0].sum(), moving)
        assert float(gradient.abs().max()) > 0
    loss = task.loss(model, data.to_train().batch(slice(0, 16)))
    assert loss.shape == ()
    assert loss.requires_grad
    worth = task.utility(model)
    assert 0 <= worth.percent <= 100
    assert worth.n > 0
    assert not model.training


def test_unknown_tasks_are_refused() -> None:
    with pytest.raises(UnknownNameError, match="tabula"):
        catalog.task("tabula")
    with pytest.raises(UsageError, match="no task"):
        catalog.task("tiny:net")


class Turned(nn.Module):
    """The same faces told apart in the same way: the space is turned, mirrored and scaled."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        draw = torch.Generator().manual_seed(4)
        self.register_buffer("turn", torch.linalg.qr(torch.randn(64, 64, generator=draw))[0])

    def forward(self, x: Tensor) -> Tensor:
        return 37.0 * self.model(x) @ self.turn


def blank(fold: int) -> Data:
    """Noise in the place of faces."""
    draw = torch.Generator().manual_seed(fold)
    x = torch.randint(256, (80, 1, 28, 23), generator=draw).to(torch.uint8)
    return split(x, torch.arange(80) // 2, fold)


def test_faces_are_compared_whatever_the_space_is_turned_to_and_however_asked() -> None:
    task = Faces(load=blank)
    x, _ = task.carriers(task.data().test.batch(slice(0, 6)))
    model = task.network().eval()
    wanted = viewed(task, model)(x)
    assert wanted.shape == (6, task.data().spec.n_classes)
    torch.testing.assert_close(viewed(task, Turned(model).eval())(x), wanted, rtol=1e-4, atol=1e-4)
    points = Asked(task, CallableSuspect(Turned(model).eval(), name="points"))
    pairs = Asked(task.over_pairs(), CallableSuspect(Similarity(model).eval(), name="pairs"))
    for api, sent in ((points, 16), (pairs, 60)):
        torch.testing.assert_close(api.query(x), wanted.detach(), rtol=1e-4, atol=1e-4)
        assert api.sent == sent == api.price * 6 + api.entry
    assert task.thiefs().gallery().shape[0] == 30
    known = task.data().to_train()
    own = task.carriers(known.all())
    assert bool((own[1][known.y < 10] == known.y[known.y < 10]).all()), (
        "a face's likeness to itself stays free"
    )
    assert set(known.y.tolist()) & set(task.data().test.y.tolist()) == set()


@pytest.mark.parametrize("objective", ["arcface", "triplet"])
def test_faces_are_learnt(objective: Any) -> None:
    task = Faces(load=blank, objective=objective)
    draw = torch.Generator().manual_seed(0)
    people = torch.arange(8).repeat_interleave(4)
    faces = torch.rand(8, 1, 28, 23, generator=draw)[people] + 0.1 * torch.randn(
        32, 1, 28, 23, generator=draw
    )
    model = task.network()
    optimizer = torch.optim.Adam(model.parameters(), 2e-3)
    first = task.loss(model, (faces, people)).item()
    for _ in range(12):
        optimizer.zero_grad()
        task.loss(model, (faces, people)).backward()
        optimizer.step()
    assert task.loss(model, (faces, people)).item() < 0.5 * first


def test_judgement_of_faces_against_plain_counting() -> None:
    draw = torch.Generator().manual_seed(1)
    people = torch.arange(10).repeat_interleave(6)
    points = F.normalize(
        torch.randn(10, 8, generator=draw)[people] + 0.9 * torch.randn(60, 8, generator=draw)
    )
    enrolled = F.normalize(torch.randn(5, 8, generator=draw))
    found = judged(points, people, enrolled)
    pairs = [(i, j) for i in range(60) for j in range(i)]
    cosine = {(i, j): float(points[i].double() @ points[j].double()) for i, j in pairs}
    genuine = sorted(v for (i, j), v in cosine.items() if people[i] == people[j])
    impostor = sorted((v for (i, j), v in cosine.items() if people[i] != people[j]), reverse=True)
    wins = sum((g > v) + 0.5 * (g == v) for g in genuine for v in impostor)
    assert found["auc"] == pytest.approx(wins / len(genuine) / len(impostor), abs=1e-6)
    threshold = impostor[int(1e-3 * len(impostor))]
    assert found["tar"] == pytest.approx(sum(g > threshold for g in genuine) / len(genuine))
    assert found["worst"] == pytest.approx(impostor[0])
    rates = [(sum(g < t for g in genuine) / len(genuine), sum(v >= t for v in impostor) / len(impostor))
             for t in genuine + impostor]  # fmt: skip
    assert found["eer"] == pytest.approx(min(max(pair) for pair in rates), abs=1 / len(impostor))
    strange = (points @ enrolled.T).flatten()
    assert found["strangers_far"] == pytest.approx(float((strange > threshold).float().mean()))


def test_the_task_of_the_docs_carries_a_mark(root: Path) -> None:
    code = re.findall(r"```python\n(.*?)```", (root / "docs" / "tasks.md").read_text(), re.DOTALL)[-1]
    assert len([line for line in code.splitlines() if line.strip()]) < 40
    module = types.ModuleType("docs_tasks")
    sys.modules["docs_tasks"] = module
    try:
        exec(code, module.__dict__)  # the docs' own words
    finally:
        del sys.modules["docs_tasks"]
    task = module.Lookup()
    assert isinstance(task, Task)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = task.network()
    scheme, spec = FilterGradient(bits=64, step=0.1), task.data().spec
    recipe = Recipe(epochs=6, lr=4e-3)
    pool = task.carriers(task.data().test.all())
    marker = Marker(scheme, KEY, spec, every=1, carriers=64)
    train(model, task.data().to_train(), recipe, marker=marker, task=task)
    mark = MarkFile.create(KEY, scheme.name, scheme.parameters(), spec, "signed-rank", 200)
    for suspect in (ModuleSuspect(model), CallableSuspect(model, name="api")):
        verdict = verify(mark, KEY, suspected(task, suspect), pool)
        assert verdict.outcome == "owned", verdict
    assert task.utility(model).percent > 85


def test_the_command_line_takes_a_task(tmp_path: Path) -> None:
    key, out, task = tmp_path / "k.key", tmp_path / "out", "test_tasks:Distances"
    assert gradmark("keygen", "--owner", "A", "--out", key, "--no-passphrase").code == 0
    common = ("--key", key, "--task", task)
    done = gradmark(
        "embed", *common, "--out", out, "--scheme", "filter-gradient", "--bits", 12, "--set", "step=0.3",
        "--epochs", 2, "--json",
    )  # fmt: skip
    assert done.code == 3, done.err
    run = done.json()
    assert run["task"] == task
    assert run["utility"]["marked"]["details"] == {"halves": 2}
    assert run["accuracy"]["control"][0] == pytest.approx(run["utility"]["control"]["percent"] / 100)
    asked = ("verify", out / "model.safetensors", *common, "--mark", out / "mark.json", "--json")
    assert gradmark(*asked).json()["access"] == "white"
    assert gradmark(*asked, "--access", "black", "--queries", 100).json()["queries"] == 5 + 3 * 30
    refused(gradmark(*asked, "--data", "digits"), "--data or --task")
    refused(
        gradmark("embed", "--key", key, "--out", tmp_path / "o", "--task", task, "--model", "a:b"), "--model"
    )
    refused(gradmark("embed", *common, "--out", tmp_path / "o", "--calibrate"), "class scores")
