"""Symmetric per-tensor weight quantisation, weights kept as floats on the coarse grid."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import nn

from gradmark.protocols import Thief


@dataclass(frozen=True)
class Quantize:
    """Round every weight matrix and kernel to ``bits`` bits (2 to 16)."""

    bits: int = 8

    name = "quantize"

    def run(self, model: nn.Module, thief: Thief, generator: torch.Generator) -> nn.Module:
        attacked = copy.deepcopy(model)
        top = 2 ** (self.bits - 1) - 1
        with torch.no_grad():
            for weight in (p for p in attacked.parameters() if p.ndim > 1):
                unit = weight.abs().max().clamp_min(1e-12) / top
                weight.copy_((weight / unit).round() * unit)
        return attacked.eval()
