"""An API that flattens or sharpens its probabilities."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gradmark.guards import Guard, log_softmax
from gradmark.protocols import Thief


@dataclass(frozen=True)
class OutputTemperature:
    """``softmax(logits / temperature)``: probabilities, flatter above 1 and sharper below."""

    temperature: float = 4.0

    name = "output-temperature"

    def run(self, model: nn.Module, thief: Thief, generator: torch.Generator) -> nn.Module:
        def after(scores: Tensor, noise: torch.Generator) -> Tensor:
            return (log_softmax(scores) / self.temperature).softmax(1)

        return Guard(model, generator, after=after)
