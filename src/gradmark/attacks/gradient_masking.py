"""Double backpropagation (Drucker and LeCun 1992): fine-tune for small input gradients."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from gradmark.errors import AttackError
from gradmark.protocols import Thief
from gradmark.thief import fit, logits


@dataclass(frozen=True)
class GradientMasking:
    """Labels, and ``weight / 2`` times the squared norm of each input's gradient of the label loss.

    Gradients are per input scale, so the weight means the same for every range of inputs.
    ``clip``: the gradient's greatest norm, lest the penalty make the model a constant. Raises AttackError
    where the model has no second derivative.
    """

    weight: float = 1.0
    clip: float = 1.0
    epochs: int = 5
    lr_factor: float = 1.0

    name = "gradient-masking"

    def run(self, model: nn.Module, thief: Thief, generator: torch.Generator) -> nn.Module:
        attacked = copy.deepcopy(model)

        def loss(model: nn.Module, x: Tensor, labels: Tensor) -> Tensor:
            x = x.detach().requires_grad_()
            each = F.cross_entropy(logits(model, x), labels, reduction="none")
            (gradient,) = torch.autograd.grad(each.sum(), x, create_graph=True)
            size = (thief.spec.scale * gradient.float()).flatten(1).square().sum(1)
            return (each + 0.5 * self.weight * size).mean()

        try:
            with sdpa_kernel(SDPBackend.MATH):  # fused attention has no second derivative
                lr = self.lr_factor * thief.lr
                fit(attacked, thief, generator, epochs=self.epochs, lr=lr, loss=loss, clip=self.clip)
        except RuntimeError as cause:
            if not any(word in str(cause) for word in ("derivative", "differentia")):
                raise
            raise AttackError("The model has no second derivative", found=str(cause)[:120]) from cause
        return attacked
