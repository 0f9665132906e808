"""peft: low-rank adapters on a trained network carry the mark, which stays when they are merged.

python examples/peft_lora.py [EPOCHS]
"""

from __future__ import annotations

import sys

import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model

from common import batches, judge, marker, network
from gradmark.integrations.peft import merged


def main(epochs: int = 8) -> None:
    base = network().train()
    optimizer = torch.optim.AdamW(base.parameters(), 2e-3)
    for x, y in batches(epochs):  # the model that you were given
        loss = F.cross_entropy(base(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    layers = [name for name, part in base.named_modules() if hasattr(part, "weight")]
    model, mark = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules=layers)), marker()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 5e-3)
    for x, y in batches(epochs):
        loss = F.cross_entropy(model(x), y) + mark.penalty(model, (x, y))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    judge(merged(model))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
