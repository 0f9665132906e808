"""Permuting neurons: the same function with every weight somewhere else."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import nn

from gradmark.passages import passages
from gradmark.protocols import Thief
from gradmark.rewiring import PASSAGE, mixer, need, select, unchanged
from gradmark.streams import orders, rename


@dataclass(frozen=True)
class Permute:
    """Put the neurons of every passage in a random order (Yan et al., USENIX Security 2023).

    ``streams``: the channels of residual streams too, wherever they are written or read
    (:mod:`gradmark.streams`). Raises AttackError where the model can't be traced or has no passage.
    """

    streams: bool = False

    name = "permute"

    def run(self, model: nn.Module, thief: Thief, generator: torch.Generator) -> nn.Module:
        attacked = copy.deepcopy(model)
        if self.streams:
            rename(attacked, orders(attacked, thief.x, generator))
            return unchanged(model, attacked, thief.x)
        found = need(passages(attacked, thief.x), PASSAGE)
        for passage in found:
            width = len(mixer(attacked, passage.producer).weight)
            select(attacked, passage, torch.randperm(width, generator=generator))
        return unchanged(model, attacked, thief.x)
