"""Dummy neurons: a wider network that computes the same."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import nn

from gradmark.errors import AttackError
from gradmark.passages import Mixer, Norm, Passage, passages
from gradmark.protocols import Thief
from gradmark.rewiring import PASSAGE, incoming, mixer, need, norm, select, unchanged


@dataclass(frozen=True)
class Dummy:
    """Give every passage ``share`` more neurons that leave the function alone, at random places.

    Neuron cliques of Yan et al., "Rethinking White-Box Watermarks on Deep Learning Models under Neural
    Structural Obfuscation", USENIX Security 2023: pairs of twins whose outgoing weights cancel, and for
    an odd number one neuron whose outgoing weights are zero. Their incoming weights are those of random
    neurons of the layer, jittered. ``dead``: neurons that are never on instead, with any outgoing
    weights, which takes a norm or a bias and a ReLU behind it. Raises AttackError where the model can't
    be traced, has no passage, or would compute something else.
    """

    share: float = 0.25
    dead: bool = False

    name = "dummy"

    def run(self, model: nn.Module, thief: Thief, generator: torch.Generator) -> nn.Module:
        attacked = copy.deepcopy(model)
        for passage in need(passages(attacked, thief.x), PASSAGE):
            width = len(mixer(attacked, passage.producer).weight)
            extra = max(1, round(self.share * width))
            twins = torch.randint(width, ((extra + 1) // 2,), generator=generator).repeat_interleave(2)
            select(attacked, passage, torch.cat([torch.arange(width), twins[:extra]]))
            _obfuscate(attacked, passage, width, generator, dead=self.dead)
            select(attacked, passage, torch.randperm(width + extra, generator=generator))
        return unchanged(model, attacked, thief.x)


def _obfuscate(
    model: nn.Module, passage: Passage, width: int, generator: torch.Generator, *, dead: bool
) -> None:
    """Jitter what comes into the channels from ``width`` on, pairwise alike, and cancel what leaves them; or
    let nothing through them."""
    producer, consumer = mixer(model, passage.producer), mixer(model, passage.consumer)
    rows = producer.weight.detach()[width:]
    jitter = 1 + 0.1 * torch.randn((len(rows) + 1) // 2, *rows.shape[1:], generator=generator)
    away = incoming(consumer, width + len(rows)).clone()
    even = width + len(rows) // 2 * 2
    spread = away.std(correction=0).cpu()
    clique = spread * torch.randn(len(away), (even - width) // 2, away.shape[2], generator=generator)
    away[:, width:even:2], away[:, width + 1 : even : 2] = clique.to(away), -clique.to(away)
    away[:, even:] = 0.0
    if dead:
        some = spread * torch.randn(len(away), len(rows), away.shape[2], generator=generator)
        away[:, width:] = some.to(away)
        _silence(norm(model, passage.norms[-1]) if passage.norms else producer, width)
    with torch.no_grad():
        producer.weight[width:] = rows * jitter.repeat_interleave(2, 0)[: len(rows)].to(rows)
        consumer.weight.copy_(away.reshape(consumer.weight.shape))


def _silence(part: Mixer | Norm, width: int) -> None:
    """Shift the channels from ``width`` on to where a ReLU is never on."""
    if not isinstance(part.bias, nn.Parameter):
        raise AttackError("Nothing shifts these neurons", expected="a bias or an affine norm before the ReLU")
    with torch.no_grad():
        part.bias[width:] -= 1e3
