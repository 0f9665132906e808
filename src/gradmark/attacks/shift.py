"""Weight shifting (Lukas, Jiang, Li and Kerschbaum, "SoK: How Robust is Image Classification DNN
Watermarking?", IEEE S&P 2022): filters lose what they have in common, then the task is repaired."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import nn

from gradmark.protocols import Thief
from gradmark.thief import fit, last_layer

CONVOLUTIONS = nn.Conv1d | nn.Conv2d | nn.Conv3d


@dataclass(frozen=True)
class Shift:
    """Subtract ``strength`` times a layer's mean filter from each of its filters, and fine-tune.

    Done to every convolution; in a model without any, to every linear layer but the head. ``noise``:
    also add Gaussian noise of so many standard deviations of the layer's weights. ``epochs`` on the
    thief's labels at the thief's rate follow (0: none). The paper's code has 1.5, 1 and 1.
    """

    strength: float = 1.5
    noise: float = 0.0
    epochs: int = 1

    name = "weight-shift"

    def run(self, model: nn.Module, thief: Thief, generator: torch.Generator) -> nn.Module:
        attacked = copy.deepcopy(model)
        head = last_layer(attacked, thief)
        linear = [m for m in attacked.modules() if isinstance(m, nn.Linear)]
        weights = [m.weight for m in attacked.modules() if isinstance(m, CONVOLUTIONS)]
        weights = weights or [m.weight for m in linear if m is not head] or [m.weight for m in linear]
        with torch.no_grad():
            for weight in weights:
                spread = weight.std(correction=0)
                weight.sub_(self.strength * weight.mean(0))
                if self.noise:
                    noise = torch.randn(weight.shape, generator=generator).to(weight)
                    weight.add_(noise * spread, alpha=self.noise)
        if self.epochs:
            fit(attacked, thief, generator, epochs=self.epochs)
        return attacked.eval()
