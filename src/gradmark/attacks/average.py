"""Averaging with another network of the same architecture, as in model merging."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from gradmark.errors import AttackError
from gradmark.protocols import Thief
from gradmark.suspects.module import fed
from gradmark.thief import batches


@dataclass(frozen=True)
class Average:
    """(1 - ``share``) times the model plus ``share`` times the thief's sibling, in weight space.

    Averages of two networks have other statistics than either, so the batch norms' are estimated anew
    on the thief's inputs (Jordan et al., "REPAIR", ICLR 2023). Raises AttackError where the thief has
    no sibling, or one of another architecture.
    """

    share: float = 0.5

    name = "average"

    def run(self, model: nn.Module, thief: Thief, generator: torch.Generator) -> nn.Module:
        if thief.sibling is None:
            raise AttackError("Averaging needs a second network", fix="give the thief a sibling")
        attacked = copy.deepcopy(model)
        ours, theirs = attacked.state_dict(), thief.sibling.state_dict()
        if {n: v.shape for n, v in ours.items()} != {n: v.shape for n, v in theirs.items()}:
            raise AttackError("Averaging needs a sibling of the same architecture")
        with torch.no_grad():
            # by parameter and buffer, not by name: tied weights are mixed but once
            for name, value in (*attacked.named_parameters(), *attacked.named_buffers()):
                if value.is_floating_point() and name in theirs:
                    value.mul_(1 - self.share).add_(theirs[name].to(value), alpha=self.share)
        attacked.eval()
        _recalibrate(attacked, thief, generator)
        return attacked


def _recalibrate(model: nn.Module, thief: Thief, generator: torch.Generator) -> None:
    """Set the batch norms' statistics to their mean over one epoch of the thief's inputs."""
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    if not norms:
        return
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a plain mean over the batches
        norm.training = True
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        for x, _ in batches(thief, generator):
            model(fed(model, x))
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    model.eval()
