"""Folding batch norm into the layer before it: what every deployment tool does."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

from gradmark.passages import pairs
from gradmark.protocols import Thief
from gradmark.rewiring import mixer, need, norm, unchanged


@dataclass(frozen=True)
class Fold:
    """Fuse each BatchNorm into the convolution or linear layer it follows; an Identity is left of it.

    Raises AttackError where the model can't be traced or has no BatchNorm straight after a layer.
    """

    name = "fold"

    def run(self, model: nn.Module, thief: Thief, generator: torch.Generator) -> nn.Module:
        attacked = copy.deepcopy(model).eval()
        found = [(a, b) for a, b in pairs(attacked, thief.x) if norm(attacked, b).track_running_stats]
        for name, follower in need(found, "batch norm straight after a layer"):
            layer, after = mixer(attacked, name), norm(attacked, follower)
            attacked.set_submodule(
                name,
                fuse_linear_bn_eval(layer, after)
                if isinstance(layer, nn.Linear)
                else fuse_conv_bn_eval(layer, after),
            )
            attacked.set_submodule(follower, nn.Identity())
        return unchanged(model, attacked, thief.x)
