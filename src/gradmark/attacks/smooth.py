"""Fine-tuning on smoothed labels (Szegedy et al. 2016): wrong classes are pulled to one height."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradmark.protocols import Thief
from gradmark.thief import fit, logits


@dataclass(frozen=True)
class Smooth:
    """``epochs`` on labels of which ``smoothing`` (0 to 1) is spread evenly over all classes."""

    smoothing: float = 0.1
    epochs: int = 5
    lr_factor: float = 1.0

    name = "smooth"

    def run(self, model: nn.Module, thief: Thief, generator: torch.Generator) -> nn.Module:
        attacked = copy.deepcopy(model)

        def loss(model: nn.Module, x: Tensor, labels: Tensor) -> Tensor:
            return F.cross_entropy(logits(model, x), labels, label_smoothing=self.smoothing)

        fit(attacked, thief, generator, epochs=self.epochs, lr=self.lr_factor * thief.lr, loss=loss)
        return attacked
