"""Fine-tuning all layers on the task's labels (FTAL): the cheapest attack of all."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import nn

from gradmark.protocols import Thief
from gradmark.thief import fit


@dataclass(frozen=True)
class FineTune:
    """``epochs`` of training on the thief's labels at ``lr_factor`` times the thief's learning rate."""

    epochs: int = 5
    lr_factor: float = 1.0

    name = "finetune"

    def run(self, model: nn.Module, thief: Thief, generator: torch.Generator) -> nn.Module:
        attacked = copy.deepcopy(model)
        fit(attacked, thief, generator, epochs=self.epochs, lr=self.lr_factor * thief.lr)
        return attacked
