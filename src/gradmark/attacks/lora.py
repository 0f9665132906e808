"""LoRA fine-tuning (Hu et al. 2022) with peft, merged into plain weights at the end."""

from __future__ import annotations

import copy
import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from gradmark.errors import AttackError
from gradmark.protocols import Thief
from gradmark.thief import fit, label_loss


@dataclass(frozen=True)
class LoRA:
    """``epochs`` of training updates of rank ``rank`` to all linear layers and convolutions.

    Updates are scaled by ``alpha / rank``. Grouped convolutions whose groups don't divide the rank, and
    projections inside attention modules, stay as they are; so do norms and their statistics. The
    rate is ``lr_factor`` times the owner's. Raises AttackError where peft is missing or nothing fits.
    """

    rank: int = 8
    alpha: float = 16.0
    epochs: int = 5
    lr_factor: float = 1.0

    name = "lora"

    def run(self, model: nn.Module, thief: Thief, generator: torch.Generator) -> nn.Module:
        try:
            from peft import LoraConfig, get_peft_model
        except ImportError as cause:
            raise AttackError("LoRA needs peft", fix="pip install 'gradmark[attacks]'") from cause
        attacked = copy.deepcopy(model)
        before = {name: p.requires_grad for name, p in attacked.named_parameters()}
        holder: Any = nn.Sequential(attacked)  # so that a model that is one single layer has a name
        names = [re.escape(name) for name, layer in holder.named_modules() if self._fits(layer)]
        if not names:
            raise AttackError("The model has no layer that LoRA can update", found=type(model).__name__)
        config = LoraConfig(r=self.rank, lora_alpha=self.alpha, target_modules="|".join(names))  # type: ignore[arg-type]
        with torch.random.fork_rng(devices=[]):  # peft draws from the global state
            torch.manual_seed(int(torch.randint(2**62, (), generator=generator)))
            adapted: Any = get_peft_model(holder, config)
        updates = [p for p in holder.parameters() if p.requires_grad]
        lr = self.lr_factor * thief.lr
        fit(holder, thief, generator, epochs=self.epochs, lr=lr, weights=updates, weight_decay=0.0,
            loss=lambda _, x, labels: label_loss(holder[0], x, labels))  # fmt: skip
        plain: nn.Module = adapted.merge_and_unload()[0]
        for name, p in plain.named_parameters():
            p.requires_grad_(before[name])
        return plain.eval()

    def _fits(self, layer: nn.Module) -> bool:
        if isinstance(layer, NonDynamicallyQuantizableLinear) or "weight" not in layer._parameters:
            return False
        groups = getattr(layer, "groups", 1)
        return isinstance(layer, nn.Linear | nn.Conv1d | nn.Conv2d) and self.rank % groups == 0
