"""Overwriting: the thief embeds a mark of his own, of the same scheme."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gradmark.errors import AttackError, GradmarkError
from gradmark.protocols import Thief
from gradmark.thief import fit, label_loss


@dataclass(frozen=True)
class Overwrite:
    """``epochs`` of training on labels, which carry the thief's mark where the owner's do (``keyed_labels``),
    and on the penalty of his own marker, times ``weight``.

    Raises AttackError where the thief has no marker or the marker refuses the model.
    """

    epochs: int = 5
    lr_factor: float = 1.0
    weight: float = 1.0

    name = "overwrite"

    def run(self, model: nn.Module, thief: Thief, generator: torch.Generator) -> nn.Module:
        if thief.marker is None:
            raise AttackError("The thief has no marker of his own", fix="give Thief.marker")
        attacked = copy.deepcopy(model)
        marker = thief.marker(int(torch.randint(2**31, (), generator=generator)))

        def loss(model: nn.Module, x: Tensor, labels: Tensor) -> Tensor:
            with torch.autocast(x.device.type, enabled=False):  # a mark is small beside bfloat16's rounding
                penalty: Tensor = marker.penalty(model, (x, labels))
            if getattr(marker, "labels", None):
                labels = marker.soft_labels((x, labels))
            return label_loss(model, x, labels) + self.weight * penalty

        try:
            fit(attacked, thief, generator, epochs=self.epochs, lr=self.lr_factor * thief.lr, loss=loss)
        except AttackError:
            raise
        except GradmarkError as cause:
            raise AttackError("The thief's marker refused the model", found=cause.what) from cause
        return attacked
