"""Lightning Fabric, bfloat16.

python examples/fabric_loop.py [EPOCHS]
"""

from __future__ import annotations

import sys

import torch
import torch.nn.functional as F
from lightning.fabric import Fabric

from common import batches, judge, marker, network
from gradmark.integrations.fabric import FabricMarker


def main(epochs: int = 8) -> None:
    fabric = Fabric(accelerator="cpu", devices=1, precision="bf16-mixed")
    net = network().train()
    model, optimizer = fabric.setup(net, torch.optim.AdamW(net.parameters(), 2e-3))
    mark = FabricMarker(fabric, marker())
    for x, y in batches(epochs):
        loss = F.cross_entropy(model(x), y) + mark.penalty(model, (x, y))
        optimizer.zero_grad()
        fabric.backward(loss)
        optimizer.step()
    judge(net)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
