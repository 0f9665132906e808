"""CIFAR-10 (JPEG copy) and a ResNet-20 of our own: data, network and one training loop for all sides."""

from __future__ import annotations

import io
import math
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradmark.bench.networks import ResNet

SHARED = Path(os.environ.get("GRADMARK_SHARED", Path(__file__).resolve().parents[2] / "shared"))


def resnet20() -> nn.Module:
    """Factory for ``gradmark verify --model benchmarks.cifar:resnet20``."""
    return ResNet()


def load_cifar(cache: Path) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x_train, y_train, x_test, y_test; images uint8 (n, 3, 32, 32). Decoded once into ``cache``."""
    from PIL import Image

    if not cache.exists():
        archive = np.load(SHARED / "data" / "cifar10_jpeg.npz")
        arrays = {}
        for split in ("train", "test"):
            blob, offset = archive[f"{split}_jpeg"].tobytes(), archive[f"{split}_offset"]
            images = [np.asarray(Image.open(io.BytesIO(blob[a:b]))) for a, b in pairwise(offset)]
            arrays[f"x_{split}"], arrays[f"y_{split}"] = (
                np.stack(images),
                archive[f"{split}_label"].astype(np.int64),
            )
        cache.parent.mkdir(parents=True, exist_ok=True)
        np.savez(cache, **arrays)
    archive = np.load(cache)
    x = [torch.from_numpy(archive[f"x_{s}"]).permute(0, 3, 1, 2).contiguous() for s in ("train", "test")]
    y = [torch.from_numpy(archive[f"y_{s}"]) for s in ("train", "test")]
    return x[0], y[0], x[1], y[1]


@dataclass(frozen=True)
class Schedule:
    """SGD, Nesterov, one cosine; images grow during training (``sizes``: epochs at each size)."""

    sizes: tuple[tuple[int, int], ...] = ((11, 16), (5, 24), (4, 32))
    lr: float = 0.4
    warmup: float = 0.2
    batch: int = 128

    @property
    def epochs(self) -> int:
        return sum(n for n, _ in self.sizes)


FROM_SCRATCH = Schedule()
AFTERWARDS = Schedule(sizes=((2, 32),), lr=0.05, warmup=0.05)


def shifted(x: Tensor, generator: torch.Generator) -> Tensor:
    """Random crops of the padded uint8 batch, half of them flipped."""
    n = len(x)
    shift = torch.randint(0, 9, (2, n), generator=generator)
    flip = torch.rand(n, generator=generator) < 0.5
    rows = shift[0][:, None] + torch.arange(32)
    columns = shift[1][:, None] + torch.arange(32)
    columns = torch.where(flip[:, None], columns.flip(1), columns)
    return F.pad(x, (4, 4, 4, 4))[
        torch.arange(n)[:, None, None], :, rows[:, :, None], columns[:, None, :]
    ].permute(0, 3, 1, 2)


def fit(
    net: nn.Module, x: Tensor, y: Tensor, schedule: Schedule, seed: int, checkpoint: Path,
    marker: Any = None, start: int = 0, keep: dict[int, Path] | None = None,
    log: Callable[[str], None] = print,
) -> None:  # fmt: skip
    """The user's own loop: one line for the mark. bf16 autocast, channels last, saved every epoch.

    The mark joins in epoch ``start``. ``keep``: epochs after which a copy of the checkpoint stays. A
    checkpoint without a marker's state may be taken up by a marked run before its mark joins.
    """
    net.to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(net.parameters(), schedule.lr, 0.9, weight_decay=5e-4, nesterov=True)
    sizes = [s for n, s in schedule.sizes for _ in range(n)]
    per_epoch = len(x) // schedule.batch
    steps, first = schedule.epochs * per_epoch, 0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        net.load_state_dict(state["net"])
        optimizer.load_state_dict(state["optimizer"])
        if marker is not None and "marker" in state:
            marker.load_state_dict(state["marker"])
        first = state["epoch"]
    for epoch in range(first, schedule.epochs):
        generator, clock, losses = torch.Generator().manual_seed(seed * 1000 + epoch), time.perf_counter(), []
        order = torch.randperm(len(x), generator=generator)
        net.train()
        for k in range(per_epoch):
            step = epoch * per_epoch + k
            warm = schedule.warmup * steps
            rate = (
                min(1.0, (step + 1) / warm)
                * 0.5
                * (1 + math.cos(math.pi * max(0.0, step - warm) / (steps - warm)))
            )
            for group in optimizer.param_groups:
                group["lr"] = schedule.lr * rate
            index = order[k * schedule.batch : (k + 1) * schedule.batch]
            images = shifted(x[index], generator).float() / 255
            if sizes[epoch] < 32:
                images = F.interpolate(images, size=(sizes[epoch],) * 2, mode="bilinear", antialias=True)
            batch = images.contiguous(memory_format=torch.channels_last), y[index]
            with torch.autocast("cpu", torch.bfloat16):
                task = F.cross_entropy(net(batch[0]), batch[1])
                loss = task if marker is None or epoch < start else task + marker.penalty(net, batch)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(float(task.detach()))
        status = "" if marker is None else f" {marker.status()}"
        took = time.perf_counter() - clock
        log(f"epoch {epoch + 1}/{schedule.epochs} loss {np.mean(losses):.3f} {took:.0f}s{status}")
        state = {"net": net.state_dict(), "optimizer": optimizer.state_dict(), "epoch": epoch + 1}
        if marker is not None:
            state["marker"] = marker.state_dict()
        torch.save(state, checkpoint.with_suffix(".tmp"))
        checkpoint.with_suffix(".tmp").replace(checkpoint)
        if epoch + 1 in (keep or {}):
            shutil.copy(checkpoint, keep[epoch + 1])
    net.eval()


def correct(net: nn.Module, x: Tensor, y: Tensor) -> int:
    """How many of the images the network classifies rightly, in float32."""
    net.eval()
    with torch.no_grad():
        return sum(
            int((net(a.float() / 255).argmax(1) == b).sum())
            for a, b in zip(x.split(500), y.split(500), strict=True)
        )


def described(schedule: Schedule) -> dict[str, Any]:
    return {**asdict(schedule), "epochs": schedule.epochs}
