"""Adversarial training (Goodfellow et al. 2015; Madry et al. 2018): flat around every input."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradmark.protocols import Thief
from gradmark.thief import fit, label_loss, logits, penalty_mode


@dataclass(frozen=True)
class Adversarial:
    """``epochs`` on inputs moved by at most ``eps`` input scales per entry to raise the loss.

    ``steps`` of projected gradient ascent from a random start, each of 2.5 ``eps`` / ``steps``; one
    step (of 1.25 ``eps``) is the fast gradient sign method. ``natural``: share of the loss that is
    taken at the inputs as they are.
    """

    eps: float = 8 / 255
    steps: int = 3
    natural: float = 0.5
    epochs: int = 5
    lr_factor: float = 1.0

    name = "adversarial"

    def run(self, model: nn.Module, thief: Thief, generator: torch.Generator) -> nn.Module:
        attacked = copy.deepcopy(model)

        def loss(model: nn.Module, x: Tensor, labels: Tensor) -> Tensor:
            moved = self._move(model, x, labels, thief, generator)
            value = (1 - self.natural) * label_loss(model, moved, labels)
            return value + self.natural * label_loss(model, x, labels) if self.natural else value

        fit(attacked, thief, generator, epochs=self.epochs, lr=self.lr_factor * thief.lr, loss=loss)
        return attacked

    def _move(
        self, model: nn.Module, x: Tensor, labels: Tensor, thief: Thief, generator: torch.Generator
    ) -> Tensor:
        """Adversarial neighbours (b, *shape) of ``x``, legal inputs but for the format's rounding."""
        spec, eps = thief.spec, self.eps * thief.spec.scale
        stride = eps * (2.5 / self.steps if self.steps > 1 else 1.25)
        shift = eps * (2 * torch.rand(x.shape, generator=generator) - 1).to(x)
        with penalty_mode(model):
            for _ in range(self.steps):
                moved = (x + shift).clamp(spec.low, spec.high) if spec.low is not None else x + shift
                moved = moved.detach().requires_grad_()
                value = F.cross_entropy(logits(model, moved), labels, reduction="sum")
                (gradient,) = torch.autograd.grad(value, moved)
                shift = (shift + stride * gradient.sign()).clamp(-eps, eps)
        moved = x + shift
        return moved.clamp(spec.low, spec.high) if spec.low is not None else moved
