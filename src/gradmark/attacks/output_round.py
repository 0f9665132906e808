"""An API that rounds its probabilities."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gradmark.guards import Guard, softmax, straight_through
from gradmark.protocols import Thief


@dataclass(frozen=True)
class OutputRound:
    """``decimals`` of each class's probability; the gradient passes as if nothing had happened."""

    decimals: int = 2

    name = "output-round"

    def run(self, model: nn.Module, thief: Thief, generator: torch.Generator) -> nn.Module:
        def after(scores: Tensor, noise: torch.Generator) -> Tensor:
            p = softmax(scores)
            # rounded as float64, so that the float32 is the decimal's nearest
            return straight_through(p.detach().double().round(decimals=self.decimals).to(p), p)

        return Guard(model, generator, after=after)
