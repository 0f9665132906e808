"""Fine-pruning: drop the neurons that sleep on clean inputs, then fine-tune (Liu et al. 2018)."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import nn

from gradmark.errors import AttackError
from gradmark.neurons import Neurons, observe
from gradmark.protocols import Thief
from gradmark.thief import fit

_INPUTS = 2048  # enough to rank the neurons


@dataclass(frozen=True)
class FinePrune:
    """Drop the ``fraction`` of the last convolution's filters with the smallest mean activation.

    Without a convolution (one that only cuts patches doesn't count) the last hidden linear layer
    loses neurons. Then ``epochs`` of training at ``lr_factor`` times the thief's rate, in which the
    dropped weights stay zero, and the scale and shift of a norm right behind them too.
    """

    fraction: float = 0.5
    epochs: int = 5
    lr_factor: float = 1.0

    name = "fine-prune"

    def run(self, model: nn.Module, thief: Thief, generator: torch.Generator) -> nn.Module:
        attacked = copy.deepcopy(model).eval()
        neurons = _target(observe(attacked, thief.x[:_INPUTS]))
        activity = neurons.mean
        asleep = activity.topk(round(self.fraction * len(activity)), largest=False).indices

        def drop() -> None:
            with torch.no_grad():
                for p in neurons.rows():
                    p[asleep] = 0.0

        drop()
        fit(attacked, thief, generator, epochs=self.epochs, lr=self.lr_factor * thief.lr, after=drop)
        return attacked


def _target(layers: list[Neurons]) -> Neurons:
    """The last convolution before the head, or else the last other layer."""
    hidden = layers[:-1]
    if not hidden:
        raise AttackError("Fine-pruning needs a hidden convolution or linear layer", found="none")
    return next((n for n in reversed(hidden) if n.convolution), hidden[-1])
