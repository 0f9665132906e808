"""The regularisation attack: shrink the weights hard, then fine-tune (Shafieinejad et al. 2018)."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gradmark.protocols import Thief
from gradmark.thief import fit, label_loss


@dataclass(frozen=True)
class Regularize:
    """Phase 1: ``first`` epochs with ``decay / 2`` times the squared weights (biases and norms aside)
    in the loss, so that Adam's steps feel it too. Phase 2: ``epochs`` of plain fine-tuning.
    """

    decay: float = 0.02
    first: int = 3
    epochs: int = 5
    lr_factor: float = 1.0

    name = "regularize"

    def run(self, model: nn.Module, thief: Thief, generator: torch.Generator) -> nn.Module:
        attacked = copy.deepcopy(model)
        lr = self.lr_factor * thief.lr

        def shrink(model: nn.Module, x: Tensor, labels: Tensor) -> Tensor:
            size = torch.stack([p.float().square().sum() for p in model.parameters() if p.ndim > 1]).sum()
            return label_loss(model, x, labels) + 0.5 * self.decay * size

        fit(attacked, thief, generator, epochs=self.first, lr=lr, loss=shrink, weight_decay=0.0)
        fit(attacked, thief, generator, epochs=self.epochs, lr=lr)
        return attacked
