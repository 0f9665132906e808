"""A suite: which tasks, schemes, attacks and seeds. Built in by name, or read from a JSON or TOML file."""

from __future__ import annotations

import fnmatch
import json
import re
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from gradmark import catalog
from gradmark.bench.attacks import Configured, select, standard
from gradmark.bench.experiment import Marking, find_experiment
from gradmark.ensemble import Ensemble
from gradmark.errors import UnknownNameError, UsageError
from gradmark.protocols import Access, Scheme

_LABEL = re.compile(r"[\w.+,-]{1,80}")


@dataclass(frozen=True)
class Entry:
    """A scheme in a suite. ``parameters``, ``marker`` and ``recipe`` (of the marked network's training) go
    over the task's own; ``label`` names cells."""

    name: str
    label: str = ""
    parameters: Mapping[str, Any] = field(default_factory=dict)
    marker: Mapping[str, Any] = field(default_factory=dict)
    recipe: Mapping[str, Any] = field(default_factory=dict)

    @property
    def shown(self) -> str:
        return self.label or self.name

    def marking(self, task: str) -> Marking:
        """How the scheme is put in on ``task``."""
        own = find_experiment(task).marking_of(self.name)
        return Marking(
            {**own.parameters, **self.parameters},
            {**own.marker, **self.marker},
            {**own.recipe, **self.recipe},
        )

    def scheme(self, task: str) -> Scheme:
        """The configured scheme. UnknownNameError, MarkFileError."""
        found = catalog.scheme(self.name, dict(self.marking(task).parameters))
        return found.fitting(find_experiment(task).data().spec) if isinstance(found, Ensemble) else found


@dataclass(frozen=True)
class Unit:
    """The smallest piece of work: one attack on one marked network, read in every way there is."""

    task: str
    entry: Entry
    attack: Configured
    seed: int
    queries: int
    wrong_keys: int
    accesses: tuple[Access, ...]

    @property
    def place(self) -> str:
        """Where its cells lie, under ``cells``."""
        return f"{_safe(self.task)}/{_safe(self.entry.shown)}/{self.attack.label}-{self.seed}"


@dataclass(frozen=True)
class Suite:
    """task x scheme x attack x seed. ``queries``: budget of each black-box reading; ``wrong_keys``: how many
    strangers' keys are tried on each attacked network, to see that their p-values are uniform."""

    name: str
    tasks: tuple[str, ...]
    schemes: tuple[Entry, ...]
    attacks: tuple[Configured, ...]
    seeds: tuple[int, ...] = (0, 1, 2)
    queries: int = 2000
    wrong_keys: int = 20

    def __post_init__(self) -> None:
        labels = [e.shown for e in self.schemes], [a.label for a in self.attacks]
        if not (self.tasks and self.schemes and self.attacks and self.seeds):
            raise UsageError(f"The suite {self.name} is empty", expected="tasks, schemes, attacks, seeds")
        for found in labels:
            bad = [x for x in found if not _LABEL.fullmatch(x) or found.count(x) > 1]
            if bad:
                raise UsageError("Labels of a suite must be short, plain and unique", found=", ".join(bad))
        if self.queries < 2 or self.wrong_keys < 0 or min(self.seeds) < 0:
            raise UsageError(
                "The suite's numbers make no sense", found=f"{self.queries=}, {self.wrong_keys=}"
            )

    def units(self, only: str | None = None) -> list[Unit]:
        """The work, network by network; ``only``: a pattern of labels, or of task/scheme/label-seed.

        Raises the errors of unknown names and parameters before anything is trained.
        """
        found = [u for u in self._units() if only is None or matches(u, only)]
        if not found:
            raise UsageError(f"Nothing in suite {self.name} matches", found=str(only),
                             expected="a pattern of attack labels, or task/scheme/label-seed")  # fmt: skip
        return found

    def _units(self) -> Iterator[Unit]:
        for attack in self.attacks:
            _check_attack(attack)
        for task in self.tasks:
            domain = find_experiment(task).data().spec.domain
            for entry in self.schemes:
                needs: Access = getattr(entry.scheme(task), "needs", "black")
                for seed in self.seeds:
                    for attack in self.attacks:
                        accesses = attack.accesses(needs)
                        if accesses and (not attack.domains or domain in attack.domains):
                            yield Unit(task, entry, attack, seed, self.queries, self.wrong_keys, accesses)


def matches(unit: Unit, only: str) -> bool:
    """Whether the pattern names this unit."""
    text = unit.place if "/" in only else unit.attack.label
    return fnmatch.fnmatchcase(text, only)


def find_suite(name: str) -> Suite:
    """A built-in suite, or the one in a ``.json`` or ``.toml`` file. UnknownNameError, UsageError."""
    if name.endswith((".json", ".toml")):
        return _from_file(Path(name))
    quick = ("none", "finetune-lr1", "prune-0.5", "quantize-4", "output-round-2", "permute")
    flagship = (Entry(catalog.FLAGSHIP),)
    every = tuple(Entry(scheme) for scheme in dict.fromkeys((catalog.FLAGSHIP, *catalog.SCHEMES)))
    made = {
        "digits": lambda: Suite("digits", ("digits",), every, standard(), (0, 1, 2)),
        "digits-quick": lambda: Suite(
            "digits-quick", ("digits",), flagship, select(list(quick), standard(tune=2)), (0,), wrong_keys=5
        ),
        "speech": lambda: Suite("speech", ("speech",), every, standard(), (0, 1, 2)),
        "cifar10": lambda: Suite(
            "cifar10", ("cifar10",), every, standard(tune=5, extract=15), (0, 1, 2), wrong_keys=5
        ),
    }
    if name not in made:
        raise UnknownNameError(
            f"No suite is called {name!r}", expected=f"{', '.join(made)}, or a .json or .toml file"
        )
    return made[name]()


def _from_file(path: Path) -> Suite:
    try:
        text = path.read_text()
        body: dict[str, Any] = json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
        unknown = body.keys() - {"name", "tasks", "schemes", "attacks", "seeds", "queries", "wrong_keys",
                                 "tune", "extract"}  # fmt: skip
        if unknown:
            raise ValueError(f"unknown: {', '.join(unknown)}")
        epochs = {name: int(body.pop(name)) for name in ("tune", "extract") if name in body}
        schemes = tuple(
            Entry(s) if isinstance(s, str) else Entry(**s) for s in body.get("schemes", [catalog.FLAGSHIP])
        )
        numbers = {name: int(body[name]) for name in ("queries", "wrong_keys") if name in body}
        return Suite(
            str(body.get("name", path.stem)), tuple(body["tasks"]), schemes,
            select(list(body.get("attacks", ["all"])), standard(**epochs)),
            tuple(int(s) for s in body.get("seeds", (0,))), **numbers,
        )  # fmt: skip
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as cause:
        raise UsageError(
            f"{path.name} is no suite",
            expected="tasks, and as you like schemes, attacks, seeds, queries, wrong_keys, tune, extract",
            found=f"{type(cause).__name__}: {cause}",
        ) from cause


def _check_attack(attack: Configured) -> None:
    if attack.label and attack.name == "none":
        return
    try:
        catalog.attack(attack.name, dict(attack.parameters))
    except TypeError as cause:
        raise UsageError(
            f"The attack {attack.label} can't be made", found=str(cause), expected="parameters it knows"
        ) from cause


def _safe(name: str) -> str:
    """A task's or scheme's name as a folder."""
    return re.sub(r"[^\w.+,-]", "_", name)


def described(suite: Suite) -> dict[str, Any]:
    """The suite as plain JSON values."""
    found: dict[str, Any] = json.loads(json.dumps(asdict(suite), default=dict))
    return found
