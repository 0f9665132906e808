"""Fine-tuning and retraining around the last layer: FTLL, RTLL and RTAL (Adi et al. 2018).

FTAL, their fourth, is :class:`gradmark.attacks.finetune.FineTune`.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import nn

from gradmark.protocols import Thief
from gradmark.thief import fit, last_layer


@dataclass(frozen=True)
class Retrain:
    """``epochs`` of training on the thief's labels at ``lr_factor`` times the thief's rate.

    ``reset``: draw the last layer anew first. ``part``: train the last layer alone, or all.
    """

    epochs: int = 5
    lr_factor: float = 1.0

    name = "retrain"
    part: ClassVar[Literal["last", "all"]] = "all"
    reset: ClassVar[bool] = False

    def run(self, model: nn.Module, thief: Thief, generator: torch.Generator) -> nn.Module:
        attacked = copy.deepcopy(model)
        head = last_layer(attacked, thief)
        if self.reset:
            _reset(head, generator)
        weights = list(head.parameters(recurse=False)) if self.part == "last" else None
        fit(attacked, thief, generator, epochs=self.epochs, lr=self.lr_factor * thief.lr, weights=weights)
        return attacked


@dataclass(frozen=True)
class FineTuneLast(Retrain):
    """FTLL: fine-tune the last layer, leave the others."""

    name = "ftll"
    part = "last"


@dataclass(frozen=True)
class RetrainLast(Retrain):
    """RTLL: draw the last layer anew and train it alone."""

    name = "rtll"
    part = "last"
    reset = True


@dataclass(frozen=True)
class RetrainAll(Retrain):
    """RTAL: draw the last layer anew, then train all layers."""

    name = "rtal"
    reset = True


def _reset(layer: nn.Module, generator: torch.Generator) -> None:
    """The layer as its class initialises it; where it can't, uniform weights by fan-in, no bias."""
    seed = int(torch.randint(2**62, (), generator=generator))
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        if callable(again := getattr(layer, "reset_parameters", None)):
            again()
            return
        for p in layer.parameters(recurse=False):
            bound = p[0].numel() ** -0.5 if p.ndim > 1 else 0.0
            p.uniform_(-bound, bound)
