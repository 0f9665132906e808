"""Noise on the weights."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import nn

from gradmark.protocols import Thief


@dataclass(frozen=True)
class Noise:
    """Gaussian noise on every weight matrix and kernel, of ``level`` times its standard deviation."""

    level: float = 0.1

    name = "noise"

    def run(self, model: nn.Module, thief: Thief, generator: torch.Generator) -> nn.Module:
        attacked = copy.deepcopy(model)
        with torch.no_grad():
            for weight in (p for p in attacked.parameters() if p.ndim > 1):
                noise = torch.randn(weight.shape, generator=generator).to(weight)
                weight.add_(noise * weight.std(correction=0), alpha=self.level)
        return attacked.eval()
