"""The loop that all others are held against: plain PyTorch, one line for the mark.

python examples/plain.py [EPOCHS]
"""

from __future__ import annotations

import sys

import torch
import torch.nn.functional as F

from common import batches, judge, marker, network


def main(epochs: int = 8) -> None:
    model, mark = network().train(), marker()
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3)
    for x, y in batches(epochs):
        loss = F.cross_entropy(model(x), y) + mark.penalty(model, (x, y))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    judge(model)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
