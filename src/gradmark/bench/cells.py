"""One unit of work: an attack on a marked network, and what the owner and strangers then read in it."""

from __future__ import annotations

import hashlib
import json
import platform
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gradmark import catalog
from gradmark._version import __version__
from gradmark.bench.attacks import NONE, REWRITES
from gradmark.bench.experiment import Experiment, Means, find_experiment
from gradmark.bench.store import Wanted, about, calibrated, obtain, owner_key
from gradmark.bench.suite import Unit
from gradmark.codec import MarkFile
from gradmark.embed import Marker
from gradmark.errors import GradmarkError
from gradmark.files import atomic_write
from gradmark.keys import OwnerKey
from gradmark.protocols import Access, Batch, Reading, Scheme, TestName, Thief, Verdict
from gradmark.stats import apart, run_test
from gradmark.suspects import ModuleSuspect, file_digest
from gradmark.suspects.checks import brief, device_of
from gradmark.thief import told
from gradmark.verify import verify
from gradmark.views import priced, unviewed, viewed

CARRIERS = 200
TEST: TestName = "signed-rank"
REMOVED, WORTH = -6.0, 5.0
"""A mark counts as removed where log10 p is above the first and the thief gave up at most the second."""


def networks_of(unit: Unit) -> dict[str, Wanted]:
    """The networks that a unit needs; without an attack there is no thief, and no network of his."""
    found = {
        "marked": Wanted(unit.task, "marked", unit.seed, unit.entry),
        "control": Wanted(unit.task, "control", unit.seed),
    }
    if unit.attack.name != NONE:
        found["sibling"] = Wanted(unit.task, "sibling", unit.seed)
    return found


def finished(unit: Unit, out: Path) -> bool:
    """Whether the unit's cells are there, made with these parameters from the network that lies there now."""
    network = out / "networks" / f"{networks_of(unit)['marked'].name}.safetensors"
    try:
        cells = json.loads((out / "cells" / f"{unit.place}.json").read_text())
        now = conditions(unit)
        wanted = plain(unit.attack.parameters), file_digest(network), set(unit.accesses), now
        first = {"conditions": now, **cells[0]}  # which cells of before they were noted lack
        ways = {cell["access"] for cell in cells}
        got = first["parameters"], first["network"], ways, first["conditions"]
    except (OSError, ValueError, LookupError, TypeError, GradmarkError):
        return False
    return bool(wanted == got)


def conditions(unit: Unit) -> dict[str, Any]:
    """What else a cell hangs on: the attack itself, how the thief trains, and how often is read."""
    means = {name: str(value) for name, value in vars(means_of(unit)).items()}
    return {"attack": unit.attack.name, "queries": unit.queries, "wrong_keys": unit.wrong_keys, **means}


def means_of(unit: Unit) -> Means:
    """How the unit's thief trains: as the task says, or with the owner's optimizer and rate."""
    experiment = find_experiment(unit.task)
    if not unit.attack.owners:
        return experiment.means
    recipe = experiment.recipe
    return replace(experiment.means, lr=recipe.lr, optimizer=recipe.optimizer)


def run_unit(unit: Unit, out: Path, device: str = "cpu") -> list[dict[str, Any]]:
    """Attack, read, write the cells; what an attack fails with goes into them as ``error``.

    ``device``: where networks are trained and asked.
    """
    experiment, folder = find_experiment(unit.task), out / "networks"
    networks = networks_of(unit)
    model = obtain(networks["marked"], folder, device=device)
    obtain(networks["control"], folder, device=device)
    before, control = about(networks["marked"], folder), about(networks["control"], folder)
    head: dict[str, Any] = {
        "task": unit.task,
        "scheme": unit.entry.shown,
        "flagship": unit.entry.shown == catalog.FLAGSHIP,
        "attack": unit.attack.label,
        "attack_name": unit.attack.name,
        "parameters": plain(unit.attack.parameters),
        "conditions": conditions(unit),
        "seed": unit.seed,
        "network": before["digest"],
        "utility_control": control["utility"],
        "utility_marked": before["utility"],
        "versions": versions(),
    }
    start = time.perf_counter()
    try:
        attacked = attacked_by(unit, experiment, model, folder)
        seconds = round(time.perf_counter() - start, 2)
        worth = experiment.task.utility(unviewed(attacked))
        head |= {"utility_after": worth.percent, "utility_n": worth.n,
                 "stealing_loss": before["utility"] - worth.percent}  # fmt: skip
        if worth.details:
            head["utility_details"] = worth.details
        cells = [
            {**head, **_read(unit, experiment, attacked, way, folder), "seconds": seconds}
            for way in unit.accesses
        ]
        for cell in cells:
            cell["removal"] = removal(cell)
    except Exception as error:  # one attack that can't be run mustn't end a night's work
        told = str(error) if isinstance(error, GradmarkError) else f"unexpected {brief(error)}"
        cells = [{**head, "access": access, "error": told, "error_type": type(error).__name__,
                  "seconds": round(time.perf_counter() - start, 2)} for access in unit.accesses]  # fmt: skip
    path = out / "cells" / f"{unit.place}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(path, (json.dumps(cells, indent=1) + "\n").encode(), overwrite=True)
    return cells


def attacked_by(unit: Unit, experiment: Experiment, model: nn.Module, folder: Path) -> nn.Module:
    """The attacked model as one that gives the owner's scores.

    A thief attacks what gives scores as he sees them; what changes inputs stands before the model's own API,
    what changes answers behind the owner's scores; a rewrite of the weights knows no scores at all.
    """
    task, name = experiment.task, unit.attack.name
    if name == NONE:
        return viewed(task, model)
    attack = catalog.attack(name, dict(unit.attack.parameters))
    thief = thief_of(unit, experiment, folder, device_of(model))
    if name.startswith("input-") or name in REWRITES:
        return viewed(task, attack.run(model, thief, generator("attack", unit)).eval())
    seen = viewed(task if unit.attack.query_side else experiment.stolen(), model)
    done = attack.run(seen, thief, generator("attack", unit)).eval()
    return done if unit.attack.query_side else viewed(task, unviewed(done))


def thiefs_rows(experiment: Experiment, seed: int) -> tuple[Tensor, torch.Generator]:
    """The training inputs that the thief of a seed has, and the generator that drew them, for all else."""
    draw = torch.Generator().manual_seed(_number("thief", experiment.name, seed))
    n = len(experiment.data().to_train())
    return torch.randperm(n, generator=draw)[: int(n * experiment.thief_share)], draw


def thief_of(unit: Unit, experiment: Experiment, folder: Path, device: torch.device) -> Thief:
    """A third of the training inputs, drawn by the seed alone, and all else that the thief may use.

    All of it lies on ``device``.
    """
    data, means = experiment.data(), means_of(unit)
    index, draw = thiefs_rows(experiment, unit.seed)
    x, labels = data.to_train().batch(index)
    x, labels = x.to(device), labels.to(device)
    own = obtain(networks_of(unit)["sibling"], folder, device=str(device))
    sibling = viewed(experiment.stolen(), own)

    def new(make: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
        return lambda: experiment.thiefs(make)().to(device)

    def marker(seed: int) -> Marker:
        marking = unit.entry.marking(unit.task)
        key = OwnerKey.from_seed(_number("thief's key", unit.task, seed), "a thief")
        scheme = unit.entry.scheme(unit.task)
        if hasattr(scheme, "calibrated"):  # the thief's unmarked network is his own
            seen = ModuleSuspect(viewed(experiment.task, unviewed(sibling)))
            some = experiment.task.carriers((x[:2000].cpu(), labels[:2000].cpu()))
            scheme = scheme.calibrated(key, data.spec, seen, some)
        return Marker(scheme, key, data.spec, seed=seed, **dict(marking.marker))

    return Thief(
        data.spec, x, labels,
        surrogate=experiment.surrogate(data, experiment.surrogates, draw).to(device),
        sibling=sibling,
        fresh=new(experiment.task.network), other=new(experiment.other),
        marker=marker, augment=means.augmentation(),
        lr=means.lr, optimizer=means.optimizer, batch_size=means.batch_size, autocast=means.autocast,
        directions=told(unit.entry.scheme(unit.task).parameters()),
    )  # fmt: skip


def _read(
    unit: Unit, experiment: Experiment, attacked: nn.Module, access: Access, folder: Path
) -> dict[str, Any]:
    """The owner's verdict, and what strangers' keys read in the same network."""
    start, pool = time.perf_counter(), experiment.carriers()
    verdict = _verdict(unit, experiment, owner_key(unit.seed), attacked, pool, access, folder)
    first = _number("strangers", unit.task, unit.seed)
    strangers = [OwnerKey.from_seed(first + i, "a stranger") for i in range(unit.wrong_keys)]
    wrong = [_verdict(unit, experiment, k, attacked, pool, access, folder).log10_p for k in strangers]
    row = verdict.to_json()
    found = {
        name: row[name] for name in ("access", "log10_p", "match", "n_bits", "ties", "queries", "outcome")
    }
    found["parts"] = _parts(unit.entry.scheme(unit.task), verdict.reading)
    return {**found, "wrong_key_log10_p": wrong, "read_seconds": round(time.perf_counter() - start, 2)}


def _parts(scheme: Scheme, reading: Reading | None) -> list[dict[str, Any]]:
    """What each scheme of an ensemble reads by itself: which of them it is that outlives an attack."""
    if reading is None or not reading.parts:
        return []
    names = [part.name for part in getattr(scheme, "parts", ())]
    pieces = apart((reading.values * reading.bits).numpy(), reading.parts)
    tested = [run_test(TEST, values) for values in pieces]
    return [
        {
            "scheme": name,
            "log10_p": got.log10_p,
            "n_match": got.n_match,
            "n": got.n,
            "mean": float(values.mean()),
        }
        for name, got, values in zip(names, tested, pieces, strict=True)
    ]


def _verdict(
    unit: Unit,
    experiment: Experiment,
    key: OwnerKey,
    model: nn.Module,
    pool: Batch,
    access: Access,
    folder: Path,
) -> Verdict:
    scheme = calibrated(unit.entry, unit.task, unit.seed, key, folder)
    mark = MarkFile.create(
        key, scheme.name, scheme.parameters(), experiment.data().spec, TEST, CARRIERS, salt=bytes(16)
    )
    suspect = priced(experiment.task, ModuleSuspect(model))
    return verify(mark, key, suspect, pool, access=access, queries=unit.queries)


def removal(cell: dict[str, Any]) -> bool:
    """Whether the thief got away with it: no evidence left, and the model still worth having."""
    return bool(cell["log10_p"] > REMOVED and cell["stealing_loss"] <= WORTH)


def generator(purpose: str, unit: Unit) -> torch.Generator:
    """The unit's own randomness: the same for every scheme, in whatever order units are run."""
    return torch.Generator().manual_seed(_number(purpose, unit.task, unit.attack.label, unit.seed))


def _number(*parts: object) -> int:
    text = json.dumps([str(part) for part in parts]).encode()
    return int.from_bytes(hashlib.sha256(text).digest()[:7], "big")


def plain(parameters: Any) -> dict[str, Any]:
    """Parameters as a JSON file gives them back."""
    found: dict[str, Any] = json.loads(json.dumps(dict(parameters)))
    return found


def versions() -> dict[str, str]:
    """What the numbers were made with."""
    return {"gradmark": __version__, "torch": str(torch.__version__), "numpy": np.__version__,
            "python": platform.python_version()}  # fmt: skip
