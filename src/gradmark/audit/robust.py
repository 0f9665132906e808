"""Hard inputs: the worst within a small box (PGD), and common corruptions of each domain."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from gradmark.protocols import Batch, ModelSpec, WhiteBox
from gradmark.scores import probabilities

RADII = (0.01, 0.03, 0.1)  # of the input's natural scale; of its loudness for signals
SEVERITIES = (1, 2, 3)
Corruption = Callable[[Tensor, int, torch.Generator], Tensor]


def unit(spec: ModelSpec, x: Tensor) -> float:
    """What an amplitude of 1 is: the natural scale, or a signal's root mean square."""
    return float(x.square().mean().sqrt()) if spec.domain == "signal" else spec.scale


def pgd(
    suspect: WhiteBox,
    batch: Batch,
    spec: ModelSpec,
    radius: float,
    generator: torch.Generator,
    steps: int = 20,
) -> Tensor:
    """Which inputs (n,) stay right under projected gradient descent in the l_inf ball of ``radius``.

    One random start, step 2.5 radius / steps, cross-entropy (Madry et al., ICLR 2018); an input that was
    ever turned counts as lost. ``radius`` in units of the inputs.
    """
    x, labels = batch
    right = suspect.query(x).argmax(1) == labels
    moved = x + radius * (2 * torch.rand(x.shape, generator=generator) - 1)
    for step in range(steps + 1):
        moved = clipped(x + (moved - x).clamp(-radius, radius), spec)
        scores = suspect.query(moved)
        right &= scores.argmax(1) == labels
        if step == steps or not bool(right.any()):
            break
        hit = F.one_hot(labels, scores.shape[1]).float()
        p = probabilities(scores)
        slope = scores.softmax(1) - hit if p is None else -hit / p
        moved = moved + 2.5 * radius / steps * suspect.vjp(moved, slope).sign()
    return right


def clipped(x: Tensor, spec: ModelSpec) -> Tensor:
    """Inside the legal range, where there is one."""
    return x if spec.low is None and spec.high is None else x.clamp(spec.low, spec.high)


def corruptions(spec: ModelSpec, x: Tensor) -> dict[str, Corruption]:
    """The corruptions that suit the domain: inputs, severity 1 to 3 and a generator to inputs."""
    size = unit(spec, x)

    def noise(*levels: float) -> Corruption:
        return lambda v, s, g: v + size * levels[s - 1] * torch.randn(v.shape, generator=g)

    if spec.domain == "vector":
        return {"noise": noise(0.1, 0.2, 0.4), "dropout": _dropout}
    if spec.domain == "signal":
        return {"noise": noise(0.1, 0.3, 0.6), "gain": _gain, "time mask": _time_mask}
    return {
        "noise": noise(0.04, 0.08, 0.16),
        "blur": _blur,
        "contrast": _contrast,
        "brightness": lambda v, s, g: v + size * (0.08, 0.16, 0.3)[s - 1],
        "pixelate": _pixelate,
    }


def corrupted(
    spec: ModelSpec, x: Tensor, corruption: Corruption, severity: int, generator: torch.Generator
) -> Tensor:
    """``x`` (n, *shape) spoilt, and made legal again."""
    return spec.snap(clipped(corruption(x, severity, generator), spec))


def _dropout(x: Tensor, severity: int, generator: torch.Generator) -> Tensor:
    return x * (torch.rand(x.shape, generator=generator) >= (0.05, 0.1, 0.2)[severity - 1])


def _gain(x: Tensor, severity: int, _: torch.Generator) -> Tensor:
    return x * (0.7, 0.5, 0.25)[severity - 1]


def _time_mask(x: Tensor, severity: int, generator: torch.Generator) -> Tensor:
    length = x.shape[-1]
    width = max(1, round(length * (0.05, 0.1, 0.2)[severity - 1]))
    start = torch.randint(length - width + 1, (len(x), 1), generator=generator)
    place = torch.arange(length)
    hidden = (place >= start) & (place < start + width)
    return x.masked_fill(hidden.reshape(len(x), *[1] * (x.ndim - 2), length), 0.0)


def _blur(x: Tensor, severity: int, _: torch.Generator) -> Tensor:
    sigma = (0.4, 0.7, 1.0)[severity - 1] * max(1.0, x.shape[-1] / 32)
    reach = min(math.ceil(3 * sigma), min(x.shape[-2:]) - 1)
    taps = torch.exp(-0.5 * (torch.arange(-reach, reach + 1) / sigma) ** 2)
    taps = taps / taps.sum()
    planes = F.pad(x.reshape(-1, 1, *x.shape[-2:]), (reach,) * 4, mode="reflect")
    return F.conv2d(F.conv2d(planes, taps[None, None, None]), taps[None, None, :, None]).reshape(x.shape)


def _contrast(x: Tensor, severity: int, _: torch.Generator) -> Tensor:
    centre = x.flatten(1).mean(1).reshape(-1, *[1] * (x.ndim - 1))
    return centre + (x - centre) * (0.75, 0.5, 0.3)[severity - 1]


def _pixelate(x: Tensor, severity: int, _: torch.Generator) -> Tensor:
    height, width = x.shape[-2:]
    block = min((1 + severity) * max(1, width // 32), height, width)
    small = F.avg_pool2d(x, block, ceil_mode=True, count_include_pad=False)
    return small.repeat_interleave(block, -2).repeat_interleave(block, -1)[..., :height, :width]
