"""Labels that carry the mark: what smoothing takes from the right class goes to the wrong ones by the key.

Label smoothing (Szegedy et al., CVPR 2016) asks that all wrong classes be equally likely, and so works
against every bit that lies in how they compare. Spread by the key instead, it is what writes such bits: the
task's own loss carries the mark, on every input and without another pass. A cross-entropy against soft labels
is the sum of one that tells the right class from the rest and of one among the wrong classes alone (Zhao et
al., Decoupled Knowledge Distillation, CVPR 2022), so that the share of the right class is what it would be.
"""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from gradmark.errors import UsageError
from gradmark.protocols import Batch


@runtime_checkable
class Tilting(Protocol):
    """A scheme with bits in how wrong classes compare on natural inputs."""

    def tilt(self, mark: Any, x: Tensor, labels: Tensor, margin: float) -> Tensor:
        """Logits (b, C) that meet ``margin`` in every bit: of sum zero, and zero at the labels (b,)."""
        ...


def carried_by_labels(scheme: Any) -> tuple[int, ...]:
    """Numbers of the scheme's parts that labels can carry. UsageError where there is none."""
    parts = getattr(scheme, "parts", (scheme,))
    found = tuple(i for i, part in enumerate(parts) if isinstance(part, Tilting))
    if not found:
        raise UsageError(
            "Labels can't carry this mark", expected="a part in how wrong classes compare, as class-contrast",
            found=repr(scheme), fix="Leave `keyed_labels` out",
        )  # fmt: skip
    return found


def soft_labels(scheme: Any, mark: Any, batch: Batch, margin: float, smoothing: float) -> Tensor:
    """Probabilities (b, C) for inputs (b, *shape) and labels (b,), float32.

    The label has ``1 - smoothing (C - 1) / C``, as in ``torch.nn.functional.cross_entropy``; the others share
    the rest as the softmax of the scheme's tilt. Raises UsageError without any smoothing, and for labels that
    are no classes.
    """
    x, labels = batch
    if not 0 < smoothing < 1 or labels.ndim != 1 or labels.is_floating_point():
        raise UsageError(
            "There is nothing for keyed labels to spread", expected="0 < smoothing < 1, and labels (b,)",
            found=f"{smoothing=}, labels {tuple(labels.shape)}",
        )  # fmt: skip
    with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
        logits: Tensor = scheme.tilt(mark, x.detach().float(), labels, margin).float()
        classes = logits.shape[1]
        spread = smoothing * (classes - 1) / classes
        own = torch.nn.functional.one_hot(labels, classes).to(logits)
        wrong = logits.masked_fill(own.bool(), -torch.inf).softmax(1)
        return (1 - spread) * own + spread * wrong
