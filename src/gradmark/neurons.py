"""What a network's neurons do on given inputs, for attacks that pick some of them out."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
_NORMS = (_NormBase, nn.GroupNorm)


@dataclass(eq=False)
class Neurons:
    """The neurons (n,) of one layer, or filters of one convolution, and the norm right behind it.

    A neuron's activation at an input is its output's positive part behind the norm, averaged over
    positions; ``mean`` and ``deviation`` (n,) are over the inputs.
    """

    layer: nn.Module
    norm: nn.Module | None = None
    _seen: list[Tensor] = field(default_factory=list, repr=False)

    @property
    def mean(self) -> Tensor:
        return torch.cat(self._seen).mean(0)

    @property
    def deviation(self) -> Tensor:
        return torch.cat(self._seen).std(0, correction=0)

    @property
    def convolution(self) -> bool:
        """A convolution, and not one that cuts the input into patches (its own size apart)."""
        size, stride = getattr(self.layer, "kernel_size", None), getattr(self.layer, "stride", None)
        return size is not None and (size != stride or size == (1,) * len(size))

    def rows(self) -> list[nn.Parameter]:
        """The parameters with one entry or row per neuron: weight, bias and the norm's two."""
        found = [getattr(m, name, None) for m in (self.layer, self.norm) for name in ("weight", "bias")]
        return [p for p in found if isinstance(p, nn.Parameter)]


def observe(model: nn.Module, x: Tensor, *, batch_size: int = 256) -> list[Neurons]:
    """Layers in the order in which ``model`` first calls them; the last is the head. Draws nothing.

    ``x`` (n, *shape). The model runs in its own mode: put it in eval mode first.
    """
    found: dict[nn.Module, Neurons] = {}
    last: list[tuple[Tensor, Neurons]] = []

    def hook(module: nn.Module, args: tuple[Any, ...], out: Any) -> None:
        if isinstance(module, LAYERS):
            neurons = found.setdefault(module, Neurons(module))
            last[:] = [(out, neurons)]
        elif last and args and args[0] is last[0][0]:  # it takes this very layer's output
            neurons = last[0][1]
            neurons.norm = module
            neurons._seen.pop()
        else:
            return
        axis = out.ndim - 1 if isinstance(neurons.layer, nn.Linear) and out.ndim != 2 else 1
        active = out.detach().float().relu().movedim(axis, 1)
        neurons._seen.append(active.flatten(2).mean(2) if active.ndim > 2 else active)

    watched = [m for m in model.modules() if isinstance(m, (*LAYERS, *_NORMS)) and "weight" in m._parameters]
    handles = [m.register_forward_hook(hook) for m in watched]
    try:
        with torch.no_grad():
            for part in x.split(batch_size):
                model(part)
    finally:
        for handle in handles:
            handle.remove()
    return list(found.values())
