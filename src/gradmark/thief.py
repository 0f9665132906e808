"""What the attacks that train have in common: the thief's own loop, written once.

Everything random is drawn from the generator that the attack was given, so an attack repeats.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradmark.embed.heads import output_layer
from gradmark.embed.modes import penalty_mode
from gradmark.errors import AttackError
from gradmark.protocols import Batch, Thief
from gradmark.suspects.checks import unwrap
from gradmark.suspects.module import fed, undisturbed
from gradmark.views import View

Loss = Callable[[nn.Module, Tensor, Tensor], Tensor]
"""From the model, inputs (b, *shape) and labels (b,) to a scalar."""
Student = Literal["fresh", "other", "sibling"]
_PUBLIC = ("step", "kernel_size", "whitening", "equaliser", "view")


def logits(model: nn.Module, x: Tensor) -> Tensor:
    """Scores (b, C) in float32: what the model answers, or its logarithm where that is probabilities."""
    out: Tensor = unwrap(model(x)).float()
    p = out.detach()
    if bool((p >= 0).all()) and bool(((p.sum(1) - 1).abs() < 1e-3).all()):
        return out.clamp_min(1e-12).log()
    return out


def label_loss(model: nn.Module, x: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy with the labels; the task's own loss where the model is a view of another task's."""
    if isinstance(model, View):
        return model.task.loss(model.model, (x, labels))
    return F.cross_entropy(logits(model, x), labels)


def batches(thief: Thief, generator: torch.Generator, data: Batch | None = None) -> Iterator[Batch]:
    """One shuffled, augmented epoch of ``data`` (by default all that the thief has labelled).

    The last batch is left out where it is smaller than the others, unless it is the only one.
    """
    x, labels = data if data is not None else (thief.x, thief.labels)
    size = min(thief.batch_size, len(x))
    order = torch.randperm(len(x), generator=generator)
    for index in order[: len(x) // size * size].split(size):
        part = x[index]
        yield (part if thief.augment is None else thief.augment(part, generator)), labels[index]


def fit(
    model: nn.Module,
    thief: Thief,
    generator: torch.Generator,
    *,
    epochs: int,
    lr: float | None = None,
    loss: Loss = label_loss,
    weights: list[nn.Parameter] | None = None,
    data: Batch | None = None,
    weight_decay: float = 5e-4,
    warmup: float = 0.0,
    clip: float | None = None,
    after: Callable[[], None] | None = None,
) -> None:
    """Train ``model`` in place for ``epochs`` and leave it in eval mode; the rate falls by a cosine.

    ``lr``: the peak rate, by default the owner's. ``weights``: train these alone; parts of the model
    that hold none of them keep their eval mode, so batch statistics stay too. ``warmup``: share of
    the steps in which the rate rises. ``clip``: the gradient's greatest norm. ``after`` is called
    after each step. Raises AttackError where the loss isn't finite.
    """
    trained = [p for p in model.parameters() if p.requires_grad] if weights is None else weights
    chosen = {id(p) for p in trained}
    optimizer = _optimizer(thief, trained, thief.lr if lr is None else lr, weight_decay)
    peak = optimizer.param_groups[0]["lr"]
    model.train()
    if weights is not None:
        for part in model.modules():
            part.training = any(id(p) in chosen for p in part.parameters())
    n = len(thief.x if data is None else data[0])
    steps, step = epochs * max(1, n // min(thief.batch_size, n)), 0
    # Dropout draws from the global state; weights that aren't trained need no gradient.
    with torch.random.fork_rng(devices=[]), _only(model, trained):
        torch.manual_seed(int(torch.randint(2**62, (), generator=generator)))
        for _ in range(epochs):
            for x, labels in batches(thief, generator, data):
                optimizer.param_groups[0]["lr"] = peak * rate(step, steps, warmup)
                with precision(thief):
                    value = loss(model, x, labels)
                if not bool(torch.isfinite(value)):
                    raise AttackError("The attack's training diverged", fix="lower its learning rate")
                optimizer.zero_grad()
                value.backward()
                if clip is not None:
                    nn.utils.clip_grad_norm_(trained, clip)
                optimizer.step()
                if after is not None:
                    after()
                step += 1
    optimizer.zero_grad()
    model.eval()


@contextmanager
def _only(model: nn.Module, trained: list[nn.Parameter]) -> Iterator[None]:
    """``trained`` alone take gradients in the block; every weight's own setting comes back after it."""
    everything = {id(p): p for p in [*model.parameters(), *trained]}
    before = {key: p.requires_grad for key, p in everything.items()}
    chosen = {id(p) for p in trained}
    for key, p in everything.items():
        p.requires_grad_(key in chosen)
    try:
        yield
    finally:
        for key, p in everything.items():
            p.requires_grad_(before[key])


def rate(step: int, steps: int, warmup: float = 0.0) -> float:
    """Share of the peak learning rate: a linear rise, then a cosine to zero."""
    rise = warmup * steps
    fall = 0.5 * (1 + math.cos(math.pi * max(0.0, step - rise) / max(1.0, steps - rise)))
    return fall if step >= rise else (step + 1) / (rise + 1)


def student(thief: Thief, generator: torch.Generator, kind: Student) -> nn.Module:
    """A network of the thief's own: untrained, of the same or of another architecture, or his sibling.

    Raises AttackError where he lacks it.
    """
    seed = int(torch.randint(2**62, (), generator=generator))
    if kind == "sibling":
        if thief.sibling is None:
            raise AttackError("The thief has no network of its own", fix="give Thief.sibling")
        return copy.deepcopy(thief.sibling).requires_grad_(True)
    make = thief.fresh if kind == "fresh" else thief.other
    if make is None:
        raise AttackError("The thief can't make a student", fix=f"give Thief.{kind}")
    with torch.random.fork_rng(devices=[]):  # weights are drawn from the global state
        torch.manual_seed(seed)
        return make()


def told(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """What a mark file's parameters tell everybody of what the owner looks at: for a thief who read it."""
    rows = (parameters, *(row["parameters"] for row in parameters.get("parts", ())))
    return {name: value for row in rows for name, value in row.items() if name in _PUBLIC}


def precision(thief: Thief) -> AbstractContextManager[Any]:
    """The precision in which the thief trains."""
    return nullcontext() if thief.autocast is None else torch.autocast(thief.x.device.type, thief.autocast)


def last_layer(model: nn.Module, thief: Thief) -> nn.Module:
    """The classifier's head: the layer whose output is the model's, else the last with a weight matrix.

    Raises AttackError if there is none.
    """
    with undisturbed(model):
        head = output_layer(model, fed(model, thief.x[:2]))
    if isinstance(head, nn.Module):
        return head
    found = [
        m for m in model.modules() if isinstance(w := getattr(m, "weight", None), nn.Parameter) and w.ndim > 1
    ]
    if not found:
        raise AttackError("The model has no layer with a weight matrix", found=type(model).__name__)
    return found[-1]


def _optimizer(
    thief: Thief, weights: list[nn.Parameter], lr: float, weight_decay: float
) -> torch.optim.Optimizer:
    if thief.optimizer == "adamw":
        return torch.optim.AdamW(weights, lr, weight_decay=weight_decay)
    return torch.optim.SGD(weights, lr, momentum=0.9, nesterov=True, weight_decay=weight_decay)


__all__ = [
    "Loss",
    "Student",
    "batches",
    "fit",
    "label_loss",
    "last_layer",
    "logits",
    "penalty_mode",
    "precision",
    "rate",
    "student",
    "told",
]
