"""An experiment: a task, how its owner trains, and what a thief of it has."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any, Literal

import torch
from torch import Tensor, nn

from gradmark.data import Data
from gradmark.embed import Recipe
from gradmark.embed.train import Augment, augmented
from gradmark.errors import UnknownNameError, UsageError
from gradmark.protocols import Batch, Task
from gradmark.suspects import load_factory
from gradmark.views import viewed


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
class Experiment:
    """``task``: data, scores, loss and utility. ``other`` makes an untrained network of another architecture.

    ``recipe``: how the owner trains, with the mark or without; with ``pretrain`` an unmarked network is
    trained so beforehand, and the mark is put in afterwards by ``recipe``. ``surrogate``: from the data,
    a number and a generator to inputs (n, *shape) of another distribution. ``markings``: by scheme;
    ``marking``: for all others. ``thief_share``: part of the training inputs that the thief has, labelled.
    ``siblings``: seeds of whole trainings; an unmarked one of another seed is the thief's own network.
    """

    task: Task
    other: Callable[[], nn.Module]
    recipe: Recipe
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
        """That of ``scheme``; of several (``A,B``) the first's own, since their options are its own too."""
        first = scheme.split(",")[0].strip()
        return self.markings.get(scheme, self.markings.get(first, self.marking))

    def sibling_seed(self, seed: int) -> int:
        """Another seed: one that the suite trains anyway where training is dear."""
        return seed + 1000 if self.siblings is None else (seed + 1) % self.siblings

    @property
    def name(self) -> str:
        return self.task.name

    def data(self) -> Data:
        """The task's data."""
        found: Data = self.task.data()
        return found

    def untrained(self, seed: int) -> nn.Module:
        """The owner's architecture with the weights that ``seed`` draws."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return self.task.network()

    def carriers(self) -> Batch:
        """Inputs that no training saw, from which a key picks its carriers; some of a large set."""
        return self.task.carriers(self.data().test.batch(slice(0, self.pool)))

    def thiefs(self, make: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
        """What a thief gets who asks ``make`` for a network: one that gives the task's scores."""
        return lambda: viewed(self.stolen(), make())

    def stolen(self) -> Task:
        """The task as a thief sees it: its own, unless it has a ``thiefs``."""
        found: Task = self.task.thiefs() if hasattr(self.task, "thiefs") else self.task
        return found

    def seeded(self, recipe: Recipe, seed: int) -> Recipe:
        return replace(recipe, seed=seed)

    def __hash__(self) -> int:
        return hash(self.name)


_NAMES = ("digits", "speech", "tabular", "cifar10", "faces")
BUILT_IN = {name: f"gradmark.bench.{name}:experiment" for name in _NAMES}
BUILT_IN |= {f"cifar10-{kind}": f"gradmark.bench.cifar10:{kind}" for kind in ("long", "wide")}
BUILT_IN["speech-long"] = "gradmark.bench.speech:longer"
BUILT_IN |= {f"faces-{fold}": f"gradmark.bench.faces:fold{fold}" for fold in (1, 2, 3)}
BUILT_IN |= {f"speech-{unseen}": f"gradmark.bench.speech:without{unseen}" for unseen in (1, 2, 3)}


@lru_cache(maxsize=8)
def find_experiment(name: str) -> Experiment:
    """The experiment on a built-in task, or what ``MODULE:FACTORY`` returns. UnknownNameError, UsageError."""
    if name not in BUILT_IN and ":" not in name:
        raise UnknownNameError(
            f"No task is called {name!r}", expected=f"one of {', '.join(BUILT_IN)}, or MODULE:FACTORY"
        )
    found = load_factory(BUILT_IN.get(name, name))()
    if not isinstance(found, Experiment):
        raise UsageError(f"{name} makes no experiment", expected="an Experiment", found=type(found).__name__)
    return found


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
