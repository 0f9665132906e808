"""Tasks: what a view of a model is, what an API is charged, and that all the rest works unchanged."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradmark import FilterGradient, Marker, MarkFile, OwnerKey, catalog, verify
from gradmark.data import Data, Split
from gradmark.embed import Recipe, train
from gradmark.errors import ModelError, UnknownNameError, UsageError
from gradmark.protocols import Batch, ModelSpec, Task, Utility, WhiteBox
from gradmark.suspects import CallableSuspect, ModuleSuspect
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
    assert torch.equal(data.spec.snap(x), x)
    scores = viewed(task, model)(x)
    assert scores.shape == (len(x), data.spec.n_classes)
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
