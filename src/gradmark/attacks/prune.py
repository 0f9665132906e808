"""Magnitude pruning of weight matrices and kernels: single weights, or whole filters."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.utils import prune

from gradmark.protocols import Thief
from gradmark.thief import last_layer


@dataclass(frozen=True)
class Prune:
    """Set the smallest ``fraction`` of all weights (biases and norms aside) to zero.

    ``structured``: in each layer, that share of its filters (a linear layer's rows), the ones with the
    smallest L2 norm, instead of single weights. The head keeps all its rows: each is a class's score.
    """

    fraction: float = 0.5
    structured: bool = False

    name = "prune"

    def run(self, model: nn.Module, thief: Thief, generator: torch.Generator) -> nn.Module:
        attacked, pruned = copy.deepcopy(model), copy.deepcopy(model)
        layers = _layers(pruned)
        if self.structured:
            head = last_layer(pruned, thief)
            layers = [layer for layer in layers if layer is not head]
            for layer in layers:
                prune.ln_structured(layer, "weight", amount=float(self.fraction), n=2, dim=0)
        else:
            weights = [(layer, "weight") for layer in layers]
            prune.global_unstructured(weights, prune.L1Unstructured, amount=float(self.fraction))
        for layer in layers:
            prune.remove(layer, "weight")
        attacked.load_state_dict(pruned.state_dict())  # removal alone would leave them in another order
        return attacked.eval()


def _layers(model: nn.Module) -> list[nn.Module]:
    """Each layer with a floating ``weight`` of two axes or more, shared weights once."""
    found: dict[int, nn.Module] = {}
    for module in model.modules():
        weight = module._parameters.get("weight")
        if weight is not None and weight.ndim > 1 and weight.is_floating_point():
            found.setdefault(id(weight), module)
    return list(found.values())
