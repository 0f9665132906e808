"""Lightning: a callback, and a module that knows nothing of it.

python examples/lightning_callback.py [EPOCHS]
"""

from __future__ import annotations

import sys
import warnings
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor

from common import batches, judge, marker, network
from gradmark.integrations.lightning import MarkCallback


class Digits(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = network()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Any, number: int) -> Tensor:
        x, y = batch
        return F.cross_entropy(self(x), y)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), 2e-3)


def main(epochs: int = 8) -> None:
    warnings.filterwarnings("ignore", module="lightning")
    quiet = {"logger": False, "enable_checkpointing": False, "enable_model_summary": False}
    trainer = L.Trainer(
        max_epochs=1,
        accelerator="cpu",
        callbacks=[MarkCallback(marker())],
        enable_progress_bar=False,
        **quiet,
    )
    module = Digits()
    trainer.fit(module, torch.utils.data.DataLoader(batches(epochs), batch_size=None))
    judge(module)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
