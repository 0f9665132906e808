"""Hugging Face's Trainer on a small vision transformer, two batches a step.

python examples/transformers_trainer.py [EPOCHS]
"""

from __future__ import annotations

import sys
import tempfile
from typing import Any

import torch
from transformers import TrainingArguments, ViTConfig, ViTForImageClassification

from common import DATA, judge, marker
from gradmark.integrations.transformers import MarkedTrainer


def network() -> torch.nn.Module:
    torch.manual_seed(0)
    config = ViTConfig(
        image_size=8, patch_size=2, num_channels=1, hidden_size=64, intermediate_size=128,
        num_hidden_layers=2, num_attention_heads=4, num_labels=10,
    )  # fmt: skip
    return ViTForImageClassification(config)


def rows() -> list[dict[str, Any]]:
    x, y = DATA.to_train().all()
    return [{"pixel_values": a, "labels": b} for a, b in zip(x, y, strict=True)]


def main(epochs: int = 12) -> None:
    model = network()
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, num_train_epochs=epochs, per_device_train_batch_size=32, gradient_accumulation_steps=2,
            learning_rate=2e-3, lr_scheduler_type="cosine", save_strategy="no", report_to=[], use_cpu=True,
            disable_tqdm=True, logging_strategy="no",
        )  # fmt: skip
        MarkedTrainer(model=model, args=arguments, train_dataset=rows(), marker=marker()).train()
    judge(model)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
