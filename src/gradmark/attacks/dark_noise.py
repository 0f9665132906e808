"""Erasing dark knowledge: make the wrong classes equally likely, against marks in how they compare."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gradmark.protocols import Thief
from gradmark.thief import fit, logits


@dataclass(frozen=True)
class DarkNoise:
    """Labels, and ``weight`` times the divergence from uniform wrong classes to the model's own.

    The target keeps the model's probability of the label and spreads the rest evenly. The divergence
    to it is (1 - p(label)) times the one among wrong classes; ``decoupled`` leaves that factor out,
    which on fitted inputs is next to nothing (Zhao et al. 2022 do so in distillation).
    """

    weight: float = 1.0
    decoupled: bool = True
    epochs: int = 5
    lr_factor: float = 1.0

    name = "dark-noise"

    def run(self, model: nn.Module, thief: Thief, generator: torch.Generator) -> nn.Module:
        attacked = copy.deepcopy(model)

        def loss(model: nn.Module, x: Tensor, labels: Tensor) -> Tensor:
            scores = logits(model, x)
            right = labels[:, None]
            said = scores.log_softmax(1).gather(1, right)[:, 0]
            wrong = scores.scatter(1, right, -torch.inf).log_softmax(1)
            known = wrong.scatter(1, right, 0.0)  # the label's own column counts for nothing
            n = scores.shape[1] - 1
            uneven = -known.sum(1) / n - torch.log(torch.tensor(float(n)))
            share = 1.0 if self.decoupled else 1 - said.detach().exp()
            return (-said + self.weight * share * uneven).mean()

        fit(attacked, thief, generator, epochs=self.epochs, lr=self.lr_factor * thief.lr, loss=loss)
        return attacked
