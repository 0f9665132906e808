"""Weight quantisation, weights kept as floats on the coarse grid."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from gradmark.errors import UsageError
from gradmark.protocols import Thief

Kind = Literal["uniform", "fp8", "bf16"]
FP8_TOP = torch.finfo(torch.float8_e4m3fn).max


@dataclass(frozen=True)
class Quantize:
    """Round every weight matrix and kernel to a format of fewer bits.

    ``kind``: "uniform" is symmetric around zero, with ``bits`` bits (2 to 16) and one step for each
    tensor; "fp8" is float8 E4M3 with one scale for each tensor; "bf16" is bfloat16. Raises UsageError.
    """

    bits: int = 8
    kind: Kind = "uniform"

    name = "quantize"

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise UsageError("Unknown kind of quantisation", expected=str(get_args(Kind)), found=self.kind)
        if not 2 <= self.bits <= 16:
            raise UsageError("Unusable number of bits", expected="2 to 16", found=str(self.bits))

    def run(self, model: nn.Module, thief: Thief, generator: torch.Generator) -> nn.Module:
        attacked = copy.deepcopy(model)
        with torch.no_grad():
            for weight in (p for p in attacked.parameters() if p.ndim > 1):
                weight.copy_(self._rounded(weight))
        return attacked.eval()

    def _rounded(self, weight: Tensor) -> Tensor:
        if self.kind == "bf16":
            return weight.to(torch.bfloat16).to(weight.dtype)
        largest = weight.abs().max().clamp_min(1e-12)
        if self.kind == "fp8":
            unit = largest / FP8_TOP
            return (weight / unit).clamp(-FP8_TOP, FP8_TOP).to(torch.float8_e4m3fn).to(weight.dtype) * unit
        step: Tensor = largest / (2 ** (self.bits - 1) - 1)
        return (weight / step).round() * step
