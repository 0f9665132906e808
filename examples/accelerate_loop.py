"""Accelerate: bfloat16, two batches a step; ``accelerate launch`` it for many devices.

python examples/accelerate_loop.py [EPOCHS]
"""

from __future__ import annotations

import sys

import torch
import torch.nn.functional as F
from accelerate import Accelerator

from common import batches, judge, marker, network
from gradmark.integrations.accelerate import AccelerateMarker


def main(epochs: int = 8) -> None:
    accelerator = Accelerator(mixed_precision="bf16", gradient_accumulation_steps=2, cpu=True)
    model = network().train()
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), 2e-3))
    mark = AccelerateMarker(accelerator, marker())
    for x, y in batches(epochs, 32):
        with accelerator.accumulate(model):
            loss = F.cross_entropy(model(x), y) + mark.penalty(model, (x, y))
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
    judge(accelerator.unwrap_model(model, keep_fp32_wrapper=False))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
