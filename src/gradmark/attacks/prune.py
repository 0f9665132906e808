"""Global magnitude pruning of weight matrices and kernels."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.utils import prune

from gradmark.protocols import Batch


@dataclass(frozen=True)
class Prune:
    """Set the smallest ``fraction`` of all weights (biases and norms aside) to zero."""

    fraction: float = 0.5

    name = "prune"

    def run(self, model: nn.Module, data: Iterable[Batch], generator: torch.Generator) -> nn.Module:
        attacked = copy.deepcopy(model)
        layers = [
            (module, "weight")
            for module in attacked.modules()
            if isinstance(weight := getattr(module, "weight", None), nn.Parameter) and weight.ndim > 1
        ]
        if self.fraction > 0:
            prune.global_unstructured(layers, pruning_method=prune.L1Unstructured, amount=self.fraction)
            for module, name in layers:
                prune.remove(module, name)
        return attacked.eval()
