"""Global magnitude pruning of weight matrices and kernels."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import nn

from gradmark.protocols import Thief


@dataclass(frozen=True)
class Prune:
    """Set the smallest ``fraction`` of all weights (biases and norms aside) to zero."""

    fraction: float = 0.5

    name = "prune"

    def run(self, model: nn.Module, thief: Thief, generator: torch.Generator) -> nn.Module:
        attacked = copy.deepcopy(model)
        weights = [p for p in _weights(attacked) if p.is_floating_point()]
        sizes = torch.cat([p.detach().abs().flatten() for p in weights])
        smallest = sizes.topk(round(self.fraction * len(sizes)), largest=False, sorted=False).indices
        kept = torch.ones_like(sizes).index_fill_(0, smallest, 0.0).split([p.numel() for p in weights])
        with torch.no_grad():
            for p, part in zip(weights, kept, strict=True):
                p.mul_(part.reshape(p.shape))
        return attacked.eval()


def _weights(model: nn.Module) -> list[nn.Parameter]:
    """Each layer's ``weight`` with two axes or more, shared ones once."""
    found = {id(w): w for m in model.modules() if (w := getattr(m, "weight", None)) is not None}
    return [w for w in found.values() if isinstance(w, nn.Parameter) and w.ndim > 1]
