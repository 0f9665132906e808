"""The networks that the tasks train, and for each one of another architecture, for extraction."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class DigitsNet(nn.Sequential):
    """Three convolutions with batch norm and a linear layer, for 8x8 images in grey: the demo's network."""

    def __init__(self) -> None:
        layers: list[nn.Module] = []
        for before, after, stride in ((1, 32, 1), (32, 64, 2), (64, 64, 1)):
            layers += [nn.Conv2d(before, after, 3, stride, 1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]
        super().__init__(*layers, nn.Flatten(), nn.Linear(64 * 16, 10))


class DigitsMLP(nn.Sequential):
    """Two hidden layers, for 8x8 images in grey."""

    def __init__(self) -> None:
        super().__init__(
            nn.Flatten(), nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 128), nn.ReLU(), nn.Linear(128, 10)
        )


class Block(nn.Module):
    """Two 3x3 convolutions and a parameter-free shortcut (He et al. 2016, option A)."""

    def __init__(self, inner: int, outer: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inner, outer, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outer)
        self.conv2 = nn.Conv2d(outer, outer, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outer)
        self.stride, self.extra = stride, outer - inner

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.extra or self.stride > 1:
            sides = self.extra // 2, self.extra - self.extra // 2
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, *sides))
        return F.relu(x + y)


class ResNet(nn.Module):
    """Inputs (b, 3, h, w) in [0, 1], logits (b, 10); 6 ``depth`` + 2 layers. Normalisation is inside.

    With depth 3 it is a ResNet-20, whose weights have the names that ``benchmarks/cifar.py`` gives them.
    """

    def __init__(self, depth: int = 3) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16)
        widths = [(16, 16, 1)] * depth
        for inner, outer in ((16, 32), (32, 64)):
            widths += [(inner, outer, 2)] + [(outer, outer, 1)] * (depth - 1)
        self.blocks = nn.Sequential(*[Block(*w) for w in widths])
        self.head = nn.Linear(64, 10)
        for m in self.modules():
            if isinstance(m, nn.Conv2d):
                nn.init.kaiming_normal_(m.weight)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn(self.conv((x - 0.473) / 0.25)))
        scores: Tensor = self.head(self.blocks(x).mean((2, 3)))
        return scores


class WideBlock(nn.Module):
    """Batch norm and ReLU before each of two 3x3 convolutions; a 1x1 one where the shape changes."""

    def __init__(self, inner: int, outer: int, stride: int) -> None:
        super().__init__()
        self.bn1, self.bn2 = nn.BatchNorm2d(inner), nn.BatchNorm2d(outer)
        self.conv1 = nn.Conv2d(inner, outer, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(outer, outer, 3, 1, 1, bias=False)
        self.shortcut = nn.Conv2d(inner, outer, 1, stride, bias=False) if inner != outer else None

    def forward(self, x: Tensor) -> Tensor:
        before = F.relu(self.bn1(x))
        y: Tensor = self.conv2(F.relu(self.bn2(self.conv1(before))))
        return y + (x if self.shortcut is None else self.shortcut(before))


class WideResNet(nn.Module):
    """WRN-``depth``-``width`` (Zagoruyko and Komodakis 2016): (b, 3, h, w) in [0, 1] to logits (b, 10)."""

    def __init__(self, depth: int = 28, width: int = 10) -> None:
        super().__init__()
        per, widths = (depth - 4) // 6, [16, 16 * width, 32 * width, 64 * width]
        self.conv = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.blocks = nn.Sequential(*[
            WideBlock(widths[k] if i == 0 else widths[k + 1], widths[k + 1], 2 if i == 0 and k else 1)
            for k in range(3) for i in range(per)
        ])  # fmt: skip
        self.bn, self.head = nn.BatchNorm2d(widths[3]), nn.Linear(widths[3], 10)
        for m in self.modules():
            if isinstance(m, nn.Conv2d):
                nn.init.kaiming_normal_(m.weight)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(self.conv((x - 0.473) / 0.25))
        scores: Tensor = self.head(F.relu(self.bn(x)).mean((2, 3)))
        return scores


class PlainCNN(nn.Sequential):
    """Six convolutions without shortcuts, for 32x32 images in colour."""

    def __init__(self) -> None:
        layers: list[nn.Module] = []
        for before, after, stride in (
            (3, 32, 1), (32, 32, 1), (32, 64, 2), (64, 64, 1), (64, 128, 2), (128, 128, 1),
        ):  # fmt: skip
            layers += [nn.Conv2d(before, after, 3, stride, 1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]
        super().__init__(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, 10))
