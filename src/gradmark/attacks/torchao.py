"""Int8 weights as a deployment stores them, by torchao."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import nn

from gradmark.errors import AttackError
from gradmark.protocols import Thief


@dataclass(frozen=True)
class TorchAO:
    """``torchao.quantization.quantize_`` with Int8WeightOnlyConfig, on linear layers alone.

    The weights really are int8, one scale for each row. ``smallest``: leave layers with fewer weights
    alone. Raises AttackError where torchao is missing or no layer is left.
    """

    smallest: int = 256

    name = "torchao-int8"

    def run(self, model: nn.Module, thief: Thief, generator: torch.Generator) -> nn.Module:
        try:
            from torchao.quantization import Int8WeightOnlyConfig, quantize_
        except ImportError as cause:
            raise AttackError("torchao is missing", fix="pip install 'gradmark[attacks]'") from cause
        attacked = copy.deepcopy(model).eval()
        if not any(self._taken(part, "") for part in attacked.modules()):
            raise AttackError("No linear layer to quantise", expected=f"{self.smallest} weights or more")
        quantize_(attacked, Int8WeightOnlyConfig(), filter_fn=self._taken)
        return attacked

    def _taken(self, part: nn.Module, name: str) -> bool:
        return isinstance(part, nn.Linear) and part.weight.numel() >= self.smallest
