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
        layers = [(m, "weight") for m in attacked.modules() if getattr(m, "weight", None) is not None and m.weight.ndim > 1]
        if self.fraction > 0:
            prune.global_unstructured(layers, pruning_method=prune.L1Unstructured, amount=self.fraction)
            for module, name in layers:
                prune.remove(module, name)
        return attacked.eval()
