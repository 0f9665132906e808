"""The training loop of ``gradmark embed``: plain PyTorch with one marker line, resumable at any step.

Everything random in step ``t`` (order, augmentation, dropout) is drawn from (seed, t) alone, so a
run that was killed and resumed ends with the very weights of one that wasn't.
"""

from __future__ import annotations

import io
import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradmark.codec import atomic_write
from gradmark.data import Split
from gradmark.embed.status import MarkStatus
from gradmark.errors import ModelError, ResumeError, UsageError
from gradmark.protocols import Batch, Task
from gradmark.suspects.checks import brief, device_of, unwrap
from gradmark.views import classifies, viewed

Augment = Literal["none", "shift", "shift-flip"]
SoftLabels = Callable[[Batch, float], Tensor]
_SAVE_SECONDS = 20.0


@dataclass(frozen=True)
class Recipe:
    """How to train, the same for the marked model and its control.

    ``precision`` bfloat16 runs the model under autocast, its images and weights channels-last. ``sizes``:
    (epochs, side) in order, for square images that grow while training goes on; empty: as they are.
    ``smoothing``: share of the labels' weight spread over all classes (label smoothing).
    """

    epochs: int = 30
    batch_size: int = 64
    lr: float = 2e-3
    optimizer: Literal["adamw", "sgd"] = "adamw"
    weight_decay: float = 5e-4
    augment: Augment = "none"
    seed: int = 0
    precision: Literal["float32", "bfloat16"] = "float32"
    sizes: tuple[tuple[int, int], ...] = ()
    smoothing: float = 0.0

    def __post_init__(self) -> None:
        if self.epochs < 1 or self.batch_size < 2 or self.lr <= 0 or self.optimizer not in ("adamw", "sgd"):
            raise UsageError("The training recipe makes no sense", found=repr(self))
        if not 0 <= self.smoothing < 1:
            raise UsageError("The label smoothing makes no sense", found=str(self.smoothing))
        if self.precision not in ("float32", "bfloat16"):
            raise UsageError("No such precision", expected="float32 or bfloat16", found=self.precision)
        if self.sizes and sum(n for n, _ in self.sizes) != self.epochs:
            raise UsageError("The image sizes don't fill the epochs", found=f"{self.sizes}, {self.epochs}")
        if self.augment not in ("none", "shift", "shift-flip"):
            raise UsageError("No such augmentation", expected="none, shift or shift-flip", found=self.augment)

    def rate(self, step: int, steps: int) -> float:
        """Learning rate of a step: linear warm-up over a tenth, then a cosine to zero."""
        warm = max(1, steps // 10)
        return self.lr * min(1.0, (step + 1) / warm) * 0.5 * (1 + math.cos(math.pi * step / steps))

    def prepared(self, batch: Batch, epoch: int, device: torch.device | None = None) -> Batch:
        """The batch on its device, augmented from the global random state, at the epoch's size and in its
        memory format."""
        x, labels = augmented((batch[0].to(device), batch[1].to(device)), self.augment)
        sides = [side for n, side in self.sizes for _ in range(n)]
        if sides and x.ndim == 4 and x.shape[-1] != sides[epoch]:
            x = F.interpolate(x, size=(sides[epoch],) * 2, mode="bilinear", antialias=True)
        if self.precision == "bfloat16" and x.ndim == 4:
            x = x.contiguous(memory_format=torch.channels_last)
        return x, labels

    def autocast(self, device: str = "cpu") -> AbstractContextManager[Any]:
        """The precision of the forward passes, on this type of device."""
        if self.precision == "float32":
            return nullcontext()
        return torch.autocast(device, torch.bfloat16)


@dataclass(frozen=True)
class Progress:
    """One step's news: smoothed task loss and training accuracy, and the mark's state."""

    stage: str
    step: int
    steps: int
    task_loss: float
    accuracy: float
    mark: MarkStatus | None


class Rider(Protocol):
    """What rides along in a training: a :class:`Marker`, or something around one."""

    def penalty(self, model: nn.Module, batch: Batch) -> Tensor: ...

    def status(self) -> MarkStatus: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


def train(
    model: nn.Module,
    data: Split,
    recipe: Recipe,
    *,
    marker: Rider | None = None,
    task: Task | None = None,
    stage: str = "marked",
    checkpoint: Path | None = None,
    identity: str = "",
    report: Callable[[Progress], None] = lambda _: None,
) -> list[dict[str, Any]]:
    """Train ``model`` in place, on its device; returns its history, one row of numbers an epoch.

    ``task``: whose loss and scores to take; without one, cross-entropy of class scores, against keyed labels
    where the marker has them.

    With ``checkpoint``, state is saved there about every 20 seconds and picked up if the
    file exists and ``identity``, of whatever else the run hangs on, is the same. Raises ModelError where the
    loss isn't finite, ResumeError on a foreign checkpoint.
    """
    size = min(recipe.batch_size, len(data))
    per_epoch = len(data) // size
    steps = recipe.epochs * per_epoch
    _lay_out(model, recipe)
    optimizer = _optimizer(recipe, [p for p in model.parameters() if p.requires_grad])
    seen = model if task is None else viewed(task, model)
    soft = getattr(marker, "labels", None)
    run = {"stage": stage, "recipe": asdict(recipe), "identity": identity}
    start, history, loss_mean, accuracy = _resume(checkpoint, run, model, optimizer, marker)
    model.train()
    saved, device = time.monotonic(), device_of(model)
    order = _order(recipe.seed, start // per_epoch, len(data))
    for step in range(start, steps):
        if step % per_epoch == 0:
            order = _order(recipe.seed, step // per_epoch, len(data))
        place = step % per_epoch * size
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(_mix(recipe.seed, step))
            x, labels = recipe.prepared(data.batch(order[place : place + size]), step // per_epoch, device)
            for group in optimizer.param_groups:
                group["lr"] = recipe.rate(step, steps)
            with recipe.autocast(device.type):
                own, hits = _own_loss(task, model, (x, labels), recipe.smoothing, soft)
                loss = own if marker is None else own + marker.penalty(seen, (x, labels))
            if not bool(torch.isfinite(loss)):
                raise ModelError(f"The loss is not finite at step {step}", fix="lower the learning rate")
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        fresh = max(0.05, 1 / (step + 1))
        loss_mean += fresh * (float(own.detach()) - loss_mean)
        accuracy += fresh * (hits - accuracy)
        status = marker.status() if marker is not None and (step % 10 == 0 or step + 1 == steps) else None
        if (step + 1) % per_epoch == 0:
            history.append(_row(step + 1, loss_mean, accuracy, marker))
        report(Progress(stage, step + 1, steps, loss_mean, accuracy, status))
        if checkpoint is not None and time.monotonic() - saved > _SAVE_SECONDS:
            numbers = {"step": step + 1, "history": history, "loss": loss_mean, "accuracy": accuracy}
            _save(checkpoint, run, model, optimizer, marker, numbers)
            saved = time.monotonic()
    model.eval()
    return history


def _lay_out(model: nn.Module, recipe: Recipe) -> None:
    """Weights in memory as the precision's kernels are fastest with them."""
    if recipe.precision == "bfloat16":
        for p in model.parameters():
            if p.ndim == 4:
                p.data = p.data.contiguous(memory_format=torch.channels_last)


def _own_loss(
    task: Task | None, model: nn.Module, batch: Batch, smoothing: float, soft: SoftLabels | None
) -> tuple[Tensor, float]:
    """The task's loss, and the share of the batch that is classified rightly (0 where nothing is)."""
    if task is not None and not classifies(task):
        if soft is not None:
            raise UsageError("Keyed labels are for class scores", found=task.name, fix="leave them out")
        return task.loss(model, batch, smoothing), 0.0
    scores = unwrap(model(batch[0]))
    hits = float((scores.detach().argmax(1) == batch[1]).float().mean())
    if soft is not None:
        return F.cross_entropy(scores, soft(batch, smoothing)), hits
    return F.cross_entropy(scores, batch[1], label_smoothing=smoothing), hits


def augmented(batch: Batch, kind: Augment, generator: torch.Generator | None = None) -> Batch:
    """Images shifted by up to an eighth of their size, and flipped; other inputs as they are.

    Drawn from ``generator``, or from the global random state.
    """
    x, labels = batch
    if kind == "none" or x.ndim != 4:
        return batch
    pad = max(1, x.shape[-1] // 8)
    shift = torch.randint(0, 2 * pad + 1, (2, len(x)), generator=generator)  # on the CPU: alike everywhere
    rows = shift[0][:, None] + torch.arange(x.shape[2])
    columns = shift[1][:, None] + torch.arange(x.shape[3])
    if kind == "shift-flip":
        columns = torch.where(torch.rand(len(x), 1, generator=generator) < 0.5, columns.flip(1), columns)
    padded = F.pad(x, (pad,) * 4)
    rows, columns, own = (i.to(x.device) for i in (rows, columns, torch.arange(len(x))))
    moved = padded[own[:, None, None], :, rows[:, :, None], columns[:, None, :]]
    return moved.permute(0, 3, 1, 2).contiguous(), labels


def _optimizer(recipe: Recipe, weights: list[nn.Parameter]) -> torch.optim.Optimizer:
    if recipe.optimizer == "adamw":
        return torch.optim.AdamW(weights, recipe.lr, weight_decay=recipe.weight_decay)
    return torch.optim.SGD(weights, recipe.lr, momentum=0.9, nesterov=True, weight_decay=recipe.weight_decay)


def _row(step: int, loss: float, accuracy: float, marker: Rider | None) -> dict[str, Any]:
    row: dict[str, Any] = {"step": step, "task_loss": loss, "accuracy": accuracy}
    if marker is not None:
        status = marker.status()
        row |= {"match": status.match, "log10_p": status.log10_p, "weight": status.weight}
    return row


def _order(seed: int, epoch: int, n: int) -> Tensor:
    return torch.randperm(n, generator=torch.Generator().manual_seed(_mix(seed, -1 - epoch)))


def _mix(seed: int, step: int) -> int:
    """A seed of its own for every step; the odd multiplier keeps neighbouring runs apart."""
    return (seed * 0x9E3779B97F4A7C15 + step * 0xD1B54A32D192ED03) % 2**63


def _save(
    path: Path,
    run: dict[str, Any],
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    marker: Rider | None,
    numbers: dict[str, Any],
) -> None:
    buffer = io.BytesIO()
    state = {**run, "model": model.state_dict(), "optimizer": optimizer.state_dict()}
    torch.save({**state, "marker": None if marker is None else marker.state_dict(), **numbers}, buffer)
    atomic_write(path, buffer.getvalue(), overwrite=True)


def _resume(
    path: Path | None,
    run: dict[str, Any],
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    marker: Rider | None,
) -> tuple[int, list[dict[str, Any]], float, float]:
    """Load the checkpoint, if there is one; returns step, history, smoothed loss and accuracy."""
    if path is None or not path.exists():
        return 0, [], 0.0, 0.0
    state = _load(path, run)
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    if marker is not None:
        marker.load_state_dict(state["marker"])
    return state["step"], state["history"], state["loss"], state["accuracy"]


def _load(path: Path, run: dict[str, Any]) -> dict[str, Any]:
    """The checkpoint of this ``run``: stage, recipe and identity."""
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        differ = [name for name, value in run.items() if {"identity": "", **state}[name] != value]
    except Exception as cause:  # torch raises many kinds on damaged files
        raise ResumeError("The checkpoint can't be read", found=brief(cause), fix="start afresh") from cause
    if differ:
        raise ResumeError(
            "The checkpoint is of another run", expected=f"the same {', '.join(run)}",
            found=f"another {', '.join(differ)}", fix="Start afresh, or take its settings",
        )  # fmt: skip
    return state
