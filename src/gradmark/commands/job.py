"""What ``gradmark embed`` was asked to do, and whether model and data fit each other."""

from __future__ import annotations

import copy
import json
import shlex
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from gradmark import catalog
from gradmark._version import __version__
from gradmark.codec import sha256
from gradmark.data import Data, load_data
from gradmark.embed import Marker, Recipe
from gradmark.ensemble import Ensemble
from gradmark.errors import MarkFileError, ModelError, UsageError
from gradmark.keys import OwnerKey
from gradmark.protocols import ModelSpec, Scheme, Task, TestName
from gradmark.suspects import ModuleSuspect, build_model, load_weights, weights_digest
from gradmark.views import Classification, viewed

CARRIERS = 200
TEST: TestName = "signed-rank"
EPOCHS, EPOCHS_TUNED = 30, 5
SMOOTHING = 0.1
"""Label smoothing of the marked model: what it keeps back from the labels shows how wrong classes compare,
also through rounded scores and to a student. The control is what the owner would have without gradmark."""
_RATE_TUNED = 1 / 4  # of the learning rate from scratch
HARDENED = {"trigger.bits": 128, "trigger.pattern": "two-tone"}
"""Options of the default scheme where ``hardened`` marks go into images; see decisions 11 and 12."""
_SOFTEN, _REHEARSE = 0.3, 2e-3  # of hardened marks; the rate where the owner's optimizer isn't AdamW
_FLAGS = ("calibrate", "hardened")
_PUSH = ("margin", "carriers", "every", "rehearse", "soften")  # the Marker's own arguments


@dataclass(frozen=True)
class EmbedJob:
    """What to embed and how; None stands for the default of the scheme, the marker or the recipe."""

    model: str
    data: str
    key: OwnerKey
    out: Path
    weights: Path | None = None
    scheme: str = catalog.FLAGSHIP
    bits: int | None = None
    options: tuple[tuple[str, Any], ...] = ()
    target_p: float | None = None
    budget: float = 0.5
    epochs: int | None = None
    lr: float | None = None
    batch_size: int | None = None
    optimizer: str | None = None
    augment: str | None = None
    strength: float | None = None
    margin: float | None = None
    smoothing: float = SMOOTHING
    calibrate: bool = False
    method: str = "auto"
    seed: int = 0
    resume: bool = False
    device: str = "cpu"
    task: str | None = None
    """Says data, network and scores; ``model`` and ``data`` are empty then."""
    carriers: int | None = None
    every: int | None = None
    rehearse: float | None = None
    soften: float | None = None
    hardened: bool = False
    """Rehearsed thieves at the owner's rate and, in images, softened carriers and more triggers, two-tone."""
    keyed_labels: str = ""

    def __post_init__(self) -> None:
        for name in (*_FLAGS, "keyed_labels"):
            if self.task is not None and getattr(self, name):
                raise UsageError(f"--{_said(name)} is for class scores", fix="leave it or --task out")
        if self.keyed_labels and not 0 < self.smoothing < 1:
            raise UsageError("Keyed labels spread what smoothing takes", fix="--smoothing 0.1, or more")
        need_device(self.device)
        if self.target_p is not None and not 0 < self.target_p < 1:
            raise UsageError("The target p makes no sense", expected="0 < p < 1", found=str(self.target_p))

    def task_value(self) -> Task:
        """The task; without a name it is classification of the data."""
        if self.task is not None:
            return catalog.task(self.task)
        return Classification(
            self.data, lambda: load_data(self.data), lambda: build_model(self.model, self.model)
        )

    def recipe(self) -> Recipe:
        """The training schedule, gentler where given weights are tuned."""
        tuned = self.weights is not None
        recipe = Recipe(epochs=EPOCHS_TUNED if tuned else EPOCHS, seed=self.seed)
        recipe = replace(recipe, lr=recipe.lr * (_RATE_TUNED if tuned else 1))
        given: dict[str, Any] = {
            name: getattr(self, name) for name in ("epochs", "lr", "batch_size", "optimizer", "augment")
        }
        return replace(recipe, **{name: value for name, value in given.items() if value is not None})

    def scheme_value(self, spec: ModelSpec) -> Scheme:
        """The scheme, without the parts of an ensemble that such a model has no room for."""
        bits = {} if self.bits is None else {"bits": self.bits}
        harder = self.hardened and spec.domain == "image" and catalog.FLAGSHIP in self.scheme.split(",")
        options = {**(HARDENED if harder else {}), **dict(self.options)}
        try:
            scheme = catalog.scheme(self.scheme, {**options, **bits})
            return scheme.fitting(spec) if isinstance(scheme, Ensemble) else scheme
        except MarkFileError as error:
            raise UsageError(
                "The scheme has no such option", expected=error.expected, found=error.found
            ) from error

    def marker(self, scheme: Scheme, data: Data, method: str) -> Marker:
        own = {name: getattr(self, name) for name in _PUSH}
        given: dict[str, Any] = {name: value for name, value in own.items() if value is not None}
        if self.hardened:
            recipe = self.recipe()
            given.setdefault("rehearse", recipe.lr if recipe.optimizer == "adamw" else _REHEARSE)
            given.setdefault("soften", _SOFTEN if data.spec.domain == "image" else 0.0)
        return Marker(
            scheme,
            self.key,
            data.spec,
            target_log10_p=None if self.target_p is None else float(np.log10(self.target_p)),
            budget=self.budget,
            strength=self.strength,
            method=method,
            test=TEST,
            seed=self.seed,
            keyed_labels=self.keyed_labels,
            **given,
        )

    def other_options(self) -> list[str]:
        """What the command line was given beyond what every run names, for a report to repeat."""
        names = ("target_p", "bits", "lr", "batch_size", "optimizer", "augment", "strength", *_PUSH)
        given = {name: getattr(self, name) for name in names} | {
            "method": None if self.method == "auto" else self.method,
            "weights": None if self.weights is None else "WEIGHTS.safetensors",
            "task": self.task,
            "keyed_labels": self.keyed_labels or None,
            "device": None if self.device == "cpu" else self.device,
        }
        found = [f"--{_said(n)} {value}" for n, value in given.items() if value is not None]
        if self.smoothing != SMOOTHING:
            found.append(f"--smoothing {self.smoothing}")
        found += [f"--{name}" for name in _FLAGS if getattr(self, name)]
        return [*found, *(shlex.join(("--set", f"{n}={json.dumps(v)}")) for n, v in self.options)]


def _said(name: str) -> str:
    """As the command line has it."""
    return name.replace("_", "-")


def need_device(name: str) -> None:
    """UsageError where torch knows no such device or sees none here."""
    try:
        torch.empty(1, device=name).cpu()
    except (RuntimeError, AssertionError, NotImplementedError) as cause:
        raise UsageError(
            "There is no such device here", expected="cpu, or cuda or mps where torch sees one", found=name
        ) from cause


def fitting(job: EmbedJob) -> tuple[Data, nn.Module]:
    """The data and the model with its weights, checked against each other by one batch."""
    task = job.task_value()
    data: Data = load_data(job.data) if job.task is None else task.data()
    split = data.to_train()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(job.seed)
        model = task.network()
    if job.weights is not None:
        load_weights(model, job.weights)
    few, _ = task.carriers(split.batch(slice(0, 8)))
    classes = data.spec.n_classes if job.task else int(max(split.y.max(), data.test.y.max())) + 1
    width = ModuleSuspect(viewed(task, model), name=job.model or task.name).query(few).shape[1]
    if width < max(2, classes):
        raise ModelError(
            f"{job.model or task.name} doesn't fit the data",
            expected=f"scores for {max(2, classes)} classes or more",
            found=f"scores for {width}",
            fix="Give the model's last layer as many outputs as there are classes",
        )
    model = model.to(job.device)
    if not any(p.requires_grad for p in model.parameters()):
        raise ModelError(f"{job.model} has nothing to train", expected="weights that require a gradient")
    try:
        copy.deepcopy(model)
    except Exception as cause:  # a user's module may refuse in any way
        raise ModelError(
            f"{job.model} can't be copied for the control", found=type(cause).__name__
        ) from cause
    spec = replace(data.spec, n_classes=width)
    return Data(replace(split, spec=spec), replace(data.test, spec=spec), spec), model


def identity(job: EmbedJob, recipe: Recipe, scheme: Scheme, data: Data, model: nn.Module) -> dict[str, Any]:
    """All that determines the result, so that a resumed run can't be another one unnoticed."""
    split = data.to_train()
    content = split.x.contiguous().numpy().tobytes() + split.y.numpy().tobytes()
    return {
        "recipe": asdict(recipe),
        "scheme": scheme.name,
        "parameters": scheme.parameters(),
        "key": job.key.key_id,
        "owner": job.key.owner,
        "target p": job.target_p,
        "smoothing": job.smoothing,
        "calibrate": job.calibrate,
        **{name: getattr(job, name) for name in _PUSH},
        "hardened": job.hardened,
        "keyed labels": job.keyed_labels,
        "budget": job.budget,
        "strength": job.strength,
        "method": job.method,
        "device": job.device,
        "model": job.model,
        "task": job.task,
        "first weights": weights_digest(model),
        "data": sha256(content),
        "spec": data.spec.to_json(),
        "torch": str(torch.__version__),
        "gradmark": __version__,
    }
