"""A task: data, networks, training and a thief's means. All that the benchmark knows of a domain."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from gradmark.data import Data
from gradmark.embed import Recipe
from gradmark.embed.train import Augment, augmented
from gradmark.errors import DataError, UnknownNameError, UsageError
from gradmark.protocols import Domain
from gradmark.suspects import load_factory


@dataclass(frozen=True)
class Marking:
    """How one scheme is put in: its parameters, the Marker's arguments, changes to the owner's recipe."""

    parameters: Mapping[str, Any] = field(default_factory=dict)
    marker: Mapping[str, Any] = field(default_factory=dict)
    recipe: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Means:
    """How a thief trains; see :class:`gradmark.protocols.Thief`."""

    lr: float = 0.01
    optimizer: Literal["sgd", "adamw"] = "sgd"
    batch_size: int = 64
    augment: Augment = "none"
    autocast: torch.dtype | None = None

    def augmentation(self) -> Callable[[Tensor, torch.Generator], Tensor] | None:
        if self.augment == "none":
            return None
        return lambda x, generator: augmented((x, torch.zeros(len(x))), self.augment, generator)[0]


@dataclass(frozen=True)
class Task:
    """``load`` reads the data; ``network``, ``other`` make untrained networks of two architectures.

    ``recipe``: how the owner trains, with the mark or without; with ``pretrain`` an unmarked network is
    trained so beforehand, and the mark is put in afterwards by ``recipe``. ``surrogate``: from the data,
    a number and a generator to inputs (n, *shape) of another distribution. ``markings``: by scheme;
    ``marking``: for all others. ``thief_share``: part of the training inputs that the thief has, labelled.
    ``siblings``: seeds of whole trainings; an unmarked one of another seed is the thief's own network.
    """

    name: str
    load: Callable[[], Data]
    network: Callable[[], nn.Module]
    other: Callable[[], nn.Module]
    recipe: Recipe
    domain: Domain
    surrogate: Callable[[Data, int, torch.Generator], Tensor]
    pretrain: Recipe | None = None
    marking: Marking = Marking()
    markings: Mapping[str, Marking] = field(default_factory=dict)
    means: Means = Means()
    thief_share: float = 1 / 3
    surrogates: int = 1000
    siblings: int | None = None
    pool: int = 2000

    def marking_of(self, scheme: str) -> Marking:
        return self.markings.get(scheme, self.marking)

    def sibling_seed(self, seed: int) -> int:
        """Another seed: one that the suite trains anyway where training is dear."""
        return seed + 1000 if self.siblings is None else (seed + 1) % self.siblings

    def data(self) -> Data:
        """The data, read once in a process."""
        return _data(self)

    def untrained(self, seed: int) -> nn.Module:
        """The owner's architecture with the weights that ``seed`` draws."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return self.network()

    def seeded(self, recipe: Recipe, seed: int) -> Recipe:
        return replace(recipe, seed=seed)

    def __hash__(self) -> int:
        return hash(self.name)


@lru_cache(maxsize=2)
def _data(task: Task) -> Data:
    return task.load()


BUILT_IN = {"digits": "gradmark.bench.digits:task", "speech": "gradmark.bench.speech:task",
            "cifar10": "gradmark.bench.cifar10:task"}  # fmt: skip


@lru_cache(maxsize=8)
def find_task(name: str) -> Task:
    """A built-in task, or what ``MODULE:FACTORY`` returns. UnknownNameError, UsageError."""
    if name not in BUILT_IN and ":" not in name:
        raise UnknownNameError(
            f"No task is called {name!r}", expected=f"one of {', '.join(BUILT_IN)}, or MODULE:FACTORY"
        )
    task = load_factory(BUILT_IN.get(name, name))()
    if not isinstance(task, Task):
        raise UsageError(f"{name} makes no task", expected="a Task", found=type(task).__name__)
    return task


def shared(name: str) -> Path:
    """A file of the shared data: in GRADMARK_SHARED, or ``shared`` in or beside the current folder or above.

    DataError where it isn't there.
    """
    given = os.environ.get("GRADMARK_SHARED")
    here = Path.cwd()
    places = [Path(given)] if given else [folder / "shared" for folder in (here, *here.parents)]
    for place in places:
        if (place / "data" / name).exists():
            return place / "data" / name
    raise DataError(
        f"The task's data are missing: {name}",
        expected="shared/data in or above the current folder",
        fix="Set GRADMARK_SHARED to the folder that holds data/" + name,
    )


def blends(data: Data, n: int, generator: torch.Generator) -> Tensor:
    """Mixtures (n, *shape) of three training inputs each, of any classes, and a little noise."""
    x = data.to_train().x
    index = torch.randint(len(x), (3, n), generator=generator)
    weights = torch.rand((3, n), generator=generator)
    weights = (weights / weights.sum(0)).reshape(3, n, *([1] * (x.ndim - 1)))
    parts = torch.stack([data.to_train().batch(row)[0] for row in index])
    mixed = (weights * parts).sum(0)
    noise = 0.02 * data.spec.scale * torch.randn(mixed.shape, generator=generator)
    return data.spec.snap(mixed + noise)
