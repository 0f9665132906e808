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
import torch.nn.functional as F
from torch import Tensor, nn

from gradmark.embed.evidence import Evidence
from gradmark.embed.modes import penalty_mode
from gradmark.errors import UsageError
from gradmark.protocols import Batch

_PATIENCE = 8  # penalties in a row that nobody asks for labels beside: some are asked for more than one


@runtime_checkable
class Tilting(Protocol):
    """A scheme with bits in how wrong classes compare on natural inputs."""

    def tilt(self, mark: Any, x: Tensor, labels: Tensor, margin: float) -> Tensor:
        """Logits (b, C) that meet ``margin`` in every bit: of sum zero, and zero at the labels (b,)."""
        ...


class KeyedLabels:
    """Makes a marker's soft labels. UsageError where no label can carry a bit of the scheme's.

    ``how``: whether labels carry their parts of the mark ``alone``, or ``beside`` the penalties' push.
    ``parts``: numbers of those that they carry alone, so that no penalty pushes them.
    """

    def __init__(self, scheme: Any, mark: Any, margin: float, how: str = "beside") -> None:
        if how not in ("alone", "beside"):
            raise UsageError("No such way of keyed labels", expected="alone or beside", found=str(how))
        parts = getattr(scheme, "parts", (scheme,))
        self.scheme, self.mark, self.margin, self._unused = scheme, mark, margin, 0
        tilting = tuple(i for i, part in enumerate(parts) if isinstance(part, Tilting))
        self.parts = tilting if how == "alone" else ()
        self._only: dict[str, Any] = {"only": self.parts} if len(parts) > 1 else {}
        if not tilting:
            raise UsageError(
                "Labels can't carry this mark",
                expected="a part in how wrong classes compare, as class-contrast has it", found=repr(scheme),
                fix="Leave `keyed_labels` out",
            )  # fmt: skip

    def __call__(self, batch: Batch, smoothing: float) -> Tensor:
        """Probabilities (b, C) for inputs (b, *shape) and labels (b,), float32.

        The label has ``1 - smoothing (C - 1) / C``, as in ``torch.nn.functional.cross_entropy``; the others
        share the rest as the softmax of the scheme's tilt. Raises UsageError without any smoothing, and for
        labels that are no classes.
        """
        x, labels = batch
        if not 0 < smoothing < 1 or labels.ndim != 1 or labels.is_floating_point():
            raise UsageError(
                "There is nothing for keyed labels to spread", expected="0 < smoothing < 1, and labels (b,)",
                found=f"{smoothing=}, labels {tuple(labels.shape)}",
            )  # fmt: skip
        self._unused = 0
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            logits: Tensor = self.scheme.tilt(self.mark, x.detach().float(), labels, self.margin).float()
            classes = logits.shape[1]
            spread = smoothing * (classes - 1) / classes
            own = F.one_hot(labels, classes).to(logits)
            wrong = logits.masked_fill(own.bool(), -torch.inf).softmax(1)
            return (1 - spread) * own + spread * wrong

    def at_penalty(
        self, model: nn.Module, batch: Batch, evidence: Evidence, generator: torch.Generator,
        method: Any | None,
    ) -> None:  # fmt: skip
        """A penalty comes: with its ``method``, ``evidence`` takes in what it doesn't push.

        UsageError where one penalty comes after another and nobody has asked for the labels.
        """
        self._unused += 1
        if self._unused > _PATIENCE:
            raise UsageError(
                "The task isn't trained on the keyed labels", expected="soft_labels asked for in every step",
                found=f"{_PATIENCE} penalties without",
                fix="Take marker.soft_labels((x, y)) for y in the task's loss, or leave `keyed_labels` out",
            )  # fmt: skip
        if method is not None and self.parts:
            with torch.no_grad(), penalty_mode(model, method):
                evidence.watch(*self.scheme.probe(self.mark, model, batch, generator, method, **self._only))
