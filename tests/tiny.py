"""Small factories that the command-line tests name as ``tiny:...``."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset


def net() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 12, 3, 1, 1), nn.BatchNorm2d(12), nn.ReLU(), nn.Conv2d(12, 24, 3, 2, 1), nn.ReLU(),
        nn.Flatten(), nn.Linear(24 * 16, 10),
    )  # fmt: skip


def five_classes() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 5))


def colour() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4 * 30 * 30, 10))


class NanNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(x.flatten(1)) * float("nan")


def frozen() -> nn.Module:
    return net().requires_grad_(False)


def broken() -> nn.Module:
    raise RuntimeError("no such weights")


def nothing() -> int:
    return 3


class Digits(Dataset[tuple[Tensor, int]]):
    def __init__(self, start: int, stop: int) -> None:
        from gradmark.data import load_data

        data = load_data("digits")
        self.x, self.y = data.test.batch(slice(start, stop))

    def __len__(self) -> int:
        return len(self.y)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        return self.x[i], int(self.y[i])


def datasets() -> tuple[Digits, Digits]:
    return Digits(0, 300), Digits(300, 600)


def plain_arrays(seed: int = 0) -> dict[str, np.ndarray]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(64, 1, 8, 8, generator=generator).numpy()
    return {"x": x, "y": np.arange(64) % 10}


class Noisy(nn.Module):
    """Scores that change from call to call, as dropout without an eval mode makes them."""

    def __init__(self) -> None:
        super().__init__()
        self.body = net()

    def forward(self, x: Tensor) -> Tensor:
        return self.body(nn.functional.dropout(x, 0.5, training=True))


def noisy() -> nn.Module:
    return Noisy()
