"""``gradmark attack``: do to a model of your own what a thief would, to see what the mark stands."""

from __future__ import annotations

import copy
import inspect
import json
import time
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, cast

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import nn

from gradmark import catalog
from gradmark.codec import MarkFile
from gradmark.commands.progress import Bar
from gradmark.data import Data, Split, load_data
from gradmark.embed import accuracy_of
from gradmark.errors import AttackError, OutputPathError, UsageError
from gradmark.files import atomic_write
from gradmark.protocols import Thief
from gradmark.suspects import build_model, load_weights, save_weights
from gradmark.thief import told


@dataclass(frozen=True)
class Known:
    """An attack of the catalogue: what it is, what it does by which parameters, with their defaults."""

    name: str
    what: str
    how: str
    parameters: dict[str, Any]


def known_attacks() -> list[Known]:
    """All of them, as their own docstrings have it."""
    found = []
    for name, kind in catalog.ATTACKS.items():
        module, own = inspect.getdoc(inspect.getmodule(kind)), inspect.getdoc(kind)
        what, how = (" ".join((text or "").split("\n\n")[0].split()) for text in (module, own))
        plain = how.replace(":class:", "").replace("``", "`")
        kept = {f.name: f.default for f in fields(cast(type[Any], kind))}
        found.append(Known(name, what.rstrip("."), plain, kept))
    return found


def shown(known: list[Known]) -> Table:
    """For the terminal."""
    table = Table("attack", "what it is and does", "parameters", show_lines=True)
    for one in known:
        told = "\n".join(f"{name} = {_short(value)}" for name, value in one.parameters.items())
        table.add_row(*(escape(cell) for cell in (one.name, f"{one.what}.\n{one.how}", told)))
    return table


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else repr(value)


@dataclass(frozen=True)
class AttackJob:
    """Attacks (``a+b`` runs one after the other) on the weights ``suspect`` of the network ``model``.

    ``parameters``: of the one attack, or by attack where there are several.
    """

    suspect: Path
    attacks: tuple[str, ...]
    parameters: dict[str, Any]
    data: str
    model: str
    out: Path
    lr: float = 0.01
    optimizer: str = "sgd"
    batch_size: int = 64
    seed: int = 0
    mark: Path | None = None
    """The public mark file, if the thief has read it: attacks on directions take their size from it."""

    def of(self, attack: str) -> dict[str, Any]:
        if len(self.attacks) == 1:
            return self.parameters
        unknown = self.parameters.keys() - set(self.attacks)
        found = self.parameters.get(attack, {})
        if unknown or not isinstance(found, dict):
            raise UsageError(
                "With several attacks, parameters are given by attack",
                expected=f'{{"{attack}": {{...}}}}',
                found=str(self.parameters),
            )
        return found


def run_attack(job: AttackJob, console: Console) -> dict[str, Any]:
    """Write ``OUT/<attack>.safetensors`` and attack.json; what can't be saved as weights is a failure.

    Raises AttackError where an attack doesn't apply, OutputPathError where ``out`` exists.
    """
    attacks = {}
    for name in job.attacks:
        try:
            attacks[name] = catalog.attack(name, job.of(name))
        except TypeError as cause:
            raise UsageError(f"The attack {name} has no such parameters", found=str(cause)) from cause
    if job.out.exists():
        raise OutputPathError("The output folder exists already", found=str(job.out), fix="Name a new folder")
    if job.optimizer not in ("sgd", "adamw") or job.lr <= 0 or job.batch_size < 2:
        raise UsageError(
            "The thief's training makes no sense", found=f"{job.optimizer}, {job.lr}, {job.batch_size}"
        )
    data = load_data(job.data)
    model = _fresh(job)
    load_weights(model, job.suspect)
    rows = []
    with Bar(console) as bar:
        for i, (name, attack) in enumerate(attacks.items()):
            start = time.perf_counter()
            draw = torch.Generator().manual_seed(job.seed)
            attacked = attack.run(model.eval(), _thief(job, data), draw)
            _check_same(model, attacked, name)
            rows.append((name, attacked, round(time.perf_counter() - start, 2)))
            bar.move("attacks", i + 1, len(attacks), name)
    return _write(job, data, model, rows)


def _thief(job: AttackJob, data: Data) -> Thief:
    x, labels = _thiefs(data).all()
    return Thief(
        data.spec, x, labels, fresh=lambda: _fresh(job), lr=job.lr,
        optimizer="adamw" if job.optimizer == "adamw" else "sgd", batch_size=job.batch_size,
        directions={} if job.mark is None else told(MarkFile.load(job.mark).scheme_parameters),
    )  # fmt: skip


def _thiefs(data: Data) -> Split:
    """What the thief trains on: the training split, or every other input where there is one split alone."""
    return data.train if data.train is not None else _half(data.test, 0)


def _left(data: Data) -> Split:
    """What no attack saw."""
    return data.test if data.train is not None else _half(data.test, 1)


def _half(split: Split, first: int) -> Split:
    return Split(split.x[first::2], split.y[first::2], split.spec)


def _fresh(job: AttackJob) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(job.seed)
        return build_model(job.model, job.model)


def _check_same(model: nn.Module, attacked: nn.Module, name: str) -> None:
    """What stands in front of an API, or adds layers, is no file of weights for the same factory."""
    before = {k: v.shape for k, v in model.state_dict().items()}
    if {k: v.shape for k, v in attacked.state_dict().items()} != before or type(attacked) is not type(model):
        raise AttackError(
            f"What {name} makes can't be saved as weights of the same network",
            fix="Use gradmark bench, or the attack's run() in Python",
        )


def _write(
    job: AttackJob, data: Data, model: nn.Module, rows: list[tuple[str, nn.Module, float]]
) -> dict[str, Any]:
    try:
        job.out.mkdir(parents=True)
    except OSError as cause:
        raise OutputPathError(
            "The output folder can't be made", found=f"{cause.strerror}: {job.out}"
        ) from cause
    right, n = accuracy_of(model, _left(data))
    result: dict[str, Any] = {"suspect": str(job.suspect), "accuracy": right / n, "n": n, "attacks": []}
    for name, attacked, seconds in rows:
        path = job.out / f"{name}.safetensors"
        save_weights(copy.deepcopy(attacked), path)
        attack = catalog.attack(name, job.of(name))
        fields: Any = attack
        result["attacks"].append({
            "attack": name,
            "parameters": json.loads(json.dumps(asdict(fields), default=str)),
            "accuracy": accuracy_of(attacked, _left(data))[0] / n,
            "seconds": seconds,
            "model": str(path),
        })  # fmt: skip
    result["seed"] = job.seed
    atomic_write(job.out / "attack.json", (json.dumps(result, indent=1) + "\n").encode())
    return result


def parse_parameters(text: str) -> dict[str, Any]:
    """A JSON object. UsageError."""
    try:
        found = json.loads(text)
    except ValueError as cause:
        raise UsageError("--parameters is no JSON", found=text, expected='{"epochs": 2}') from cause
    if not isinstance(found, dict):
        raise UsageError("--parameters is no JSON object", found=text, expected='{"epochs": 2}')
    return found


__all__ = ["AttackJob", "parse_parameters", "run_attack"]
