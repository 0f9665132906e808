"""An API that tells the likeliest classes only."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gradmark.guards import Guard, softmax
from gradmark.protocols import Thief


@dataclass(frozen=True)
class OutputTopK:
    """The ``k`` largest probabilities as they are, 0 for the others (which have no gradient then)."""

    k: int = 3

    name = "output-topk"

    def run(self, model: nn.Module, thief: Thief, generator: torch.Generator) -> nn.Module:
        def after(scores: Tensor, noise: torch.Generator) -> Tensor:
            p = softmax(scores)
            kept = p.topk(min(self.k, p.shape[1]), 1).indices
            return p * torch.zeros_like(p).scatter_(1, kept, 1.0)

        return Guard(model, generator, after=after)
