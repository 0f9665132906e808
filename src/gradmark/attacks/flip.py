"""Flipping signs: where a sign passes, a neuron is as good as its negative."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gradmark.passages import pairs, passages
from gradmark.protocols import Thief
from gradmark.rewiring import column, mixer, multiply, need, norm, unchanged


@dataclass(frozen=True)
class FlipSigns:
    """Flip the sign of each neuron with probability ``share``, in two places.

    Between a layer and its BatchNorm, whatever follows: the layer's weights, the running mean and the
    norm's weight change sign. And between two layers with an odd activation (tanh) or none between.
    Raises AttackError where the model can't be traced or allows neither.
    """

    share: float = 0.5

    name = "flip-signs"

    def run(self, model: nn.Module, thief: Thief, generator: torch.Generator) -> nn.Module:
        attacked = copy.deepcopy(model)
        odd = [passage for passage in passages(attacked, thief.x) if passage.odd]
        normed = [pair for pair in pairs(attacked, thief.x) if norm(attacked, pair[1]).affine]
        need([*odd, *normed], "batch norm after a layer, or an odd activation between two")
        for name, follower in normed:
            signs = self._signs(attacked, name, generator)
            _flip(mixer(attacked, name), norm(attacked, follower), signs)
        for passage in odd:
            multiply(attacked, passage, self._signs(attacked, passage.producer, generator))
        return unchanged(model, attacked, thief.x)

    def _signs(self, model: nn.Module, name: str, generator: torch.Generator) -> Tensor:
        """+1 or -1 for each channel of a layer."""
        width = len(mixer(model, name).weight)
        return 1 - 2 * (torch.rand(width, generator=generator) < self.share).float()


def _flip(layer: nn.Module, after: nn.Module, signs: Tensor) -> None:
    """Change signs on both sides of a BatchNorm's normalisation."""
    with torch.no_grad():
        for value in (layer.weight, layer.bias, after.running_mean, after.weight):
            if isinstance(value, Tensor):
                value.mul_(column(signs, value))
