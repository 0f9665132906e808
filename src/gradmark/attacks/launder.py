"""Neural laundering (after Aiken et al. 2021): reset neurons that serve unnatural inputs.

A mark on trigger inputs needs neurons that answer to them. Without the triggers the thief looks for
neurons that are far more active on odd inputs than on natural ones.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gradmark.neurons import Neurons, observe
from gradmark.protocols import Thief
from gradmark.thief import fit

_INPUTS = 1024


@dataclass(frozen=True)
class Launder:
    """Draw anew the neurons that stand out, then fine-tune for ``epochs`` at ``lr_factor`` times the rate.

    A neuron stands out where its activation's rise from natural to odd inputs, in its own standard
    deviations, is ``threshold`` robust deviations above its layer's median; at most the share ``most``
    of a layer. Odd inputs: the thief's surrogate data, or natural ones under ``noise`` times their own
    standard deviation. The head stays.
    """

    threshold: float = 2.0
    most: float = 0.2
    noise: float = 1.0
    epochs: int = 5
    lr_factor: float = 1.0

    name = "launder"

    def run(self, model: nn.Module, thief: Thief, generator: torch.Generator) -> nn.Module:
        attacked = copy.deepcopy(model).eval()
        natural = thief.x[:_INPUTS]
        calm, excited = observe(attacked, natural), observe(attacked, self._odd(natural, thief, generator))
        for before, during in zip(calm[:-1], excited[:-1], strict=True):
            _redraw(before, self._outstanding(before, during), generator)
        fit(attacked, thief, generator, epochs=self.epochs, lr=self.lr_factor * thief.lr)
        return attacked

    def _odd(self, natural: Tensor, thief: Thief, generator: torch.Generator) -> Tensor:
        if thief.surrogate is not None:
            return thief.surrogate[:_INPUTS]
        shake = torch.randn(natural.shape, generator=generator) * natural.std() * self.noise
        return thief.spec.snap(natural + shake.to(natural))

    def _outstanding(self, natural: Neurons, odd: Neurons) -> Tensor:
        """Numbers of the neurons that stand out, the worst first."""
        deviation = natural.deviation
        rise = (odd.mean - natural.mean) / (deviation + deviation.median()).clamp_min(1e-12)
        above = rise - rise.median()
        score = above / (1.4826 * above.abs().median()).clamp_min(1e-12)
        worst = score.argsort(descending=True)[: int(self.most * len(score))]
        return worst[score[worst] > self.threshold]


def _redraw(neurons: Neurons, which: Tensor, generator: torch.Generator) -> None:
    """Fresh weights of the layer's own spread, no bias."""
    with torch.no_grad():
        weight, bias = neurons.layer.get_parameter("weight"), neurons.layer._parameters.get("bias")
        weight[which] = torch.randn(weight[which].shape, generator=generator).to(weight) * weight.std()
        if bias is not None:
            bias[which] = 0.0
