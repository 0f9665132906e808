"""Any model of any task as one that gives scores: what schemes, attacks and the bench work on.

A :class:`~gradmark.protocols.Task` knows how to ask its models for log-scores. Around a module
that makes a module (:class:`View`), whose weights and gradients are the model's own; around an
API it makes a black box (:class:`Asked`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradmark.data import Data, Split
from gradmark.protocols import Batch, BlackBox, Task, Utility
from gradmark.suspects import ModuleSuspect
from gradmark.suspects.checks import check_scores, device_of, unwrap


class View(nn.Module):
    """``model``, weights and all, as a module from inputs (b, *shape) to the task's scores (b, C)."""

    def __init__(self, task: Task, model: nn.Module) -> None:
        super().__init__()
        self.task, self.model = task, model
        self.training = model.training  # and no further: parts may be frozen

    def forward(self, x: Tensor) -> Tensor:
        return self.task.scores(self.model, x)


class Asked:
    """Black-box access to the task's scores through ``api``, which answers as the task's networks do.

    ``api``: any suspect, an endpoint above all. ``price``: inputs sent to the API for each one scored,
    ``entry``: those that are sent once. An answer to a batch that was asked before is remembered.
    """

    def __init__(self, task: Task, api: BlackBox) -> None:
        self.task, self.api, self.name, self.digest = task, api, api.name, api.digest
        self.price, self.entry = int(getattr(task, "price", 1)), int(getattr(task, "entry", 0))
        self.sent = 0
        self._known: dict[tuple[torch.Size, bytes], Tensor] = {}

    def query(self, x: Tensor) -> Tensor:
        """Scores (b, C), float32 on the CPU. Raises ModelError where the API's answers make none."""
        with torch.no_grad():
            return check_scores(self.task.scores(self._ask, x), len(x), source=self.name)

    def _ask(self, x: Tensor) -> Tensor:
        place = x.shape, x.detach().contiguous().numpy().tobytes()
        if place not in self._known:
            self._known[place] = self.api.query(x)
            self.sent += len(x)
        return self._known[place]


def suspected(task: Task, suspect: BlackBox) -> BlackBox:
    """``suspect`` as one that gives the task's scores; white-box where it was."""
    if isinstance(suspect, ModuleSuspect):
        return priced(
            task, ModuleSuspect(viewed(task, suspect.module), name=suspect.name, digest=suspect.digest)
        )
    return suspect if _plain(task) else Asked(task, suspect)


def priced(task: Task, suspect: ModuleSuspect) -> ModuleSuspect:
    """``suspect``, whose module gives the task's scores, with its queries counted as the task's API does."""
    suspect.price, suspect.entry = int(getattr(task, "price", 1)), int(getattr(task, "entry", 0))
    return suspect


def viewed(task: Task, model: nn.Module) -> nn.Module:
    """A :class:`View`, or ``model`` itself where its answers are the scores already."""
    return model if _plain(task) else View(task, model)


def unviewed(model: nn.Module) -> nn.Module:
    """The task's own model inside what an attack made of a view; ``model`` itself where there is no view."""
    return next((part.model for part in model.modules() if isinstance(part, View)), model)


def classifies(task: Task | None) -> bool:
    """Whether the task is plain classification, by what its models answer and by its loss."""
    return task is None or (_plain(task) and type(task).loss is Classification.loss)


def _plain(task: Task) -> bool:
    return type(task).scores is Classification.scores


@lru_cache(maxsize=4)
def _loaded(load: Callable[[], Data]) -> Data:
    return load()


@dataclass(frozen=True)
class Classification:
    """Models that answer with class scores: cross-entropy, accuracy, and every input is a carrier.

    ``load`` reads the data, once in a process; ``make`` makes an untrained network.
    """

    name: str
    load: Callable[[], Data]
    make: Callable[[], nn.Module]

    price: ClassVar[int] = 1
    entry: ClassVar[int] = 0

    def data(self) -> Data:
        return _loaded(self.load)

    def network(self) -> nn.Module:
        return self.make()

    def scores(self, model: Callable[[Tensor], Any], x: Tensor) -> Tensor:
        found: Tensor = unwrap(model(x))
        return found

    def carriers(self, batch: Batch) -> Batch:
        return batch

    def loss(self, model: nn.Module, batch: Batch, smoothing: float = 0.0) -> Tensor:
        return F.cross_entropy(unwrap(model(batch[0])), batch[1], label_smoothing=smoothing)

    def utility(self, model: nn.Module) -> Utility:
        right, n = accuracy_of(model, self.data().test)
        return Utility(100 * right / n, n)


@contextmanager
def judging(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, no gradients, and whatever device it lies on: inputs go there, answers come back.

    The model's mode is as it was afterwards.
    """
    training, device = model.training, device_of(model)
    hooks = []
    if device.type != "cpu":
        hooks = [
            model.register_forward_pre_hook(lambda _, x: tuple(part.to(device) for part in x)),
            model.register_forward_hook(lambda *call: unwrap(call[2]).cpu()),
        ]
    try:
        with torch.no_grad():
            model.eval()
            yield
    finally:
        model.train(training)
        for hook in hooks:
            hook.remove()


def accuracy_of(model: nn.Module, data: Split, batch: int = 512) -> tuple[int, int]:
    """Inputs classified rightly, and inputs in all."""
    right = 0
    with judging(model):
        for s in range(0, len(data), batch):
            x, labels = data.batch(slice(s, s + batch))
            right += int((unwrap(model(x)).argmax(1) == labels).sum())
    return right, len(data)
