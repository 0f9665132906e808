"""Rescaling neurons: a positive factor passes through a ReLU, so the next layer can take it back."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass

import torch
from torch import nn

from gradmark.passages import passages
from gradmark.protocols import Thief
from gradmark.rewiring import mixer, multiply, need, unchanged


@dataclass(frozen=True)
class Rescale:
    """Multiply what leaves each neuron by a factor, log-uniform from 1/``top`` to ``top``.

    Where a BatchNorm follows the layer it takes the factor, so that training could go on as before.
    Raises AttackError where the model can't be traced or no activation lets factors pass.
    """

    top: float = 10.0

    name = "rescale"

    def run(self, model: nn.Module, thief: Thief, generator: torch.Generator) -> nn.Module:
        attacked = copy.deepcopy(model)
        found = [passage for passage in passages(attacked, thief.x) if passage.scalable]
        for passage in need(found, "two layers with ReLU, pooling or batch norm alone between them"):
            width = len(mixer(attacked, passage.producer).weight)
            exponents = 2 * torch.rand(width, generator=generator) - 1
            multiply(attacked, passage, torch.exp(math.log(self.top) * exponents))
        return unchanged(model, attacked, thief.x)
