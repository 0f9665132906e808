"""Fine-tuning all layers on the task's labels: the cheapest attack of all."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from gradmark.protocols import Batch
from gradmark.suspects.checks import unwrap


@dataclass(frozen=True)
class FineTune:
    """One pass of SGD with momentum over ``data`` (the caller repeats it for epochs)."""

    lr: float = 0.01
    momentum: float = 0.9

    name = "finetune"

    def run(self, model: nn.Module, data: Iterable[Batch], generator: torch.Generator) -> nn.Module:
        attacked = copy.deepcopy(model).train()
        optimizer = torch.optim.SGD(attacked.parameters(), self.lr, self.momentum)
        with torch.random.fork_rng(devices=[]):  # dropout draws from the global state
            torch.manual_seed(int(torch.randint(2**62, (), generator=generator)))
            for x, labels in data:
                optimizer.zero_grad()
                F.cross_entropy(unwrap(attacked(x)), labels).backward()
                optimizer.step()
        return attacked.eval()
