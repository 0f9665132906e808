"""Keyed directions: how an input is nudged, one interface for images, signals and vectors.

A direction must suit the architecture (``docs/science.md`` has the measurements). Convolutional
nets hardly see absolute position, so for images and signals the direction at an input is that
input *filtered by a keyed kernel*: it moves with the picture, and crops and flips don't hurt. For
vectors, where position is meaning, it is a keyed pattern. Classes share directions, or have their
own by groups.

Every direction has root-mean-square amplitude ``step``: in units of the input's natural scale for
images and vectors, of the input's own loudness for signals (a fixed signal-to-noise ratio).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from gradmark.errors import UsageError
from gradmark.keys import OwnerKey
from gradmark.protocols import ModelSpec
from gradmark.token_directions import WordDirections, keyed_maps, keyed_words, room_for_words

# Correlation of neighbouring samples and of colour channels in natural inputs, by which kernels
# are whitened: without it every kernel mostly reads brightness and contrast. Constants, not
# estimates, so nothing about a data set can leak into the mark.
_NEIGHBOUR = {"image": 0.95, "signal": 0.9}
_CHANNEL = 0.9
_SOFT = 0.5  # magnitude, relative to the mean, at which a filtered sample counts half
_QUIET = 1e-6  # below this amplitude an input (or its filtered copy) counts as silence


class Directions(Protocol):
    """``K`` directions for each of ``groups`` groups of classes."""

    @property
    def n(self) -> int: ...

    @property
    def groups(self) -> int: ...

    def one(self, x: Tensor, group: Tensor, index: Tensor) -> Tensor:
        """Direction ``index`` (b,) of group (b,) at each input (b, *shape); same shape as ``x``."""
        ...

    def all(self, x: Tensor, group: Tensor) -> Tensor:
        """Every direction of each input's group: (b, K, *shape)."""
        ...


@dataclass(frozen=True)
class _KernelDirections:
    """Inputs passed through keyed kernels (groups, K, ...)."""

    kernels: Tensor

    @property
    def groups(self) -> int:
        return self.kernels.shape[0]

    @property
    def n(self) -> int:
        return self.kernels.shape[1]

    def one(self, x: Tensor, group: Tensor, index: Tensor) -> Tensor:
        return self._filter(x, self.kernels.to(x.device, x.dtype)[group, index][:, None])[:, 0]

    def all(self, x: Tensor, group: Tensor) -> Tensor:
        return self._filter(x, self.kernels.to(x.device, x.dtype)[group])

    def _filter(self, x: Tensor, kernels: Tensor) -> Tensor:
        """x (b, *shape), kernels (b, K, ...) -> (b, K, *shape)."""
        raise NotImplementedError


@dataclass(frozen=True)
class FilterDirections(_KernelDirections):
    """Inputs filtered by keyed kernels (groups, K, channels, channels, *taps), then scaled."""

    step: float
    scale: float
    relative: bool
    """Amplitude relative to each input's own (signals) instead of ``scale`` (images)."""

    def _filter(self, x: Tensor, kernels: Tensor) -> Tensor:
        """x (b, *shape), kernels (b, K, channels, channels, *taps) -> (b, K, *shape)."""
        taps = kernels.shape[4:]
        b, k = kernels.shape[:2]
        planes = x.reshape(b, -1, *x.shape[x.ndim - len(taps) :])  # a mono signal has no channel axis
        channels = planes.shape[1]
        padding = [t // 2 for t in reversed(taps) for _ in range(2)]
        padded = F.pad(planes, padding, mode="reflect")
        padded = padded.reshape(1, b * channels, *padded.shape[2:])
        convolve = F.conv2d if len(taps) == 2 else F.conv1d
        y = convolve(padded, kernels.reshape(b * k * channels, channels, *taps), groups=b)
        y = y.reshape(b, k, -1)
        y = y - y.mean(-1, keepdim=True)
        # Compressed, so that texture everywhere counts and not one strong edge, such as the black
        # border of a padded crop.
        y = y / (y.abs() + _SOFT * y.abs().mean(-1, keepdim=True)).clamp_min(_QUIET)
        loudness = y.square().mean(-1, keepdim=True).sqrt()
        amplitude: Tensor | float = self.step * self.scale
        if self.relative:
            amplitude = self.step * x.reshape(b, 1, -1).square().mean(-1, keepdim=True).sqrt()
        unit = torch.where(loudness > _QUIET, y / loudness.clamp_min(_QUIET), torch.zeros_like(y))
        return (unit * amplitude).reshape(b, k, *x.shape[1:])


@dataclass(frozen=True)
class EqualiserDirections(_KernelDirections):
    """Signals through keyed equalisers: symmetric kernels (groups, K, taps), so that no frequency is delayed.

    ``x + one(x)`` has each frequency's gain changed by ``step`` times a keyed curve of unit root mean square:
    a step of .1 is .9 decibels up or down (root mean square; up to 3), and silence stays silent.
    """

    step: float

    def _filter(self, x: Tensor, kernels: Tensor) -> Tensor:
        """x (b, *shape), kernels (b, K, taps) -> (b, K, *shape); all channels alike."""
        b, k, taps = kernels.shape
        planes = x.reshape(b, -1, x.shape[-1])
        channels = planes.shape[1]
        padded = F.pad(planes.reshape(1, b * channels, -1), (taps // 2, taps // 2))
        rows = kernels[:, None].expand(b, channels, k, taps).reshape(b * channels * k, 1, taps)
        y = F.conv1d(padded, rows, groups=b * channels).reshape(b, channels, k, -1).transpose(1, 2)
        return self.step * y.reshape(b, k, *x.shape[1:])


@dataclass(frozen=True)
class PatternDirections:
    """Fixed keyed patterns (groups, K, features), the same at every input of a group."""

    patterns: Tensor
    step: float
    scale: float

    @property
    def groups(self) -> int:
        return self.patterns.shape[0]

    @property
    def n(self) -> int:
        return self.patterns.shape[1]

    def one(self, x: Tensor, group: Tensor, index: Tensor) -> Tensor:
        patterns = self.patterns.to(x.device, x.dtype)
        return patterns[group, index].reshape(x.shape) * (self.step * self.scale)

    def all(self, x: Tensor, group: Tensor) -> Tensor:
        patterns = self.patterns.to(x.device, x.dtype)
        return patterns[group].reshape(len(x), self.n, *x.shape[1:]) * (self.step * self.scale)


def nudged(directions: Directions, x: Tensor, group: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    """The two inputs (b, *shape) whose answers a reading compares: to either side along direction ``index``
    (b,), or with either of two keyed tokens."""
    if isinstance(directions, WordDirections):
        return directions.both(x, group, index)
    d = directions.one(x, group, index)
    return x + d, x - d


def orthonormal(columns: Tensor) -> Tensor:
    """Gram-Schmidt of the columns (..., rows, n): unique, so every linear algebra library agrees."""
    q, r = torch.linalg.qr(columns)
    unique: Tensor = q * r.diagonal(dim1=-2, dim2=-1).sign()[..., None, :]
    return unique


def _taps(spec: ModelSpec, kernel_size: int) -> tuple[int, ...]:
    return (kernel_size,) * 2 if spec.domain == "image" else (kernel_size**2,)


def _fits(spec: ModelSpec, kernel_size: int) -> bool:
    """Reflection at the border needs an input longer than half the kernel."""
    taps = _taps(spec, kernel_size)
    return kernel_size % 2 == 1 and min(spec.input_shape[-len(taps) :]) > taps[0] // 2


def capacity(spec: ModelSpec, kernel_size: int) -> int:
    """How many independent directions one class offers; more would contradict each other."""
    if spec.domain == "vector":
        return int(np.prod(spec.input_shape))
    if spec.domain in ("text", "tokens"):
        return room_for_words(spec)
    channels = spec.input_shape[0] if len(spec.input_shape) > 1 else 1
    return channels * channels * kernel_size**2


def keyed_directions(
    key: OwnerKey, spec: ModelSpec, *, n: int, groups: int, kernel_size: int, whitening: float,
    step: float, context: bytes, equaliser: bool = False,
) -> Directions:  # fmt: skip
    """Derive the directions of a mark.

    ``kernel_size``: taps along each axis of an image's kernel (odd); a signal's has its square. Where
    it is too small for ``n`` directions, the smallest larger one that isn't is taken. ``whitening``: 0
    leaves kernels white, 1 evens out their response to natural inputs. ``equaliser``: for signals,
    :class:`EqualiserDirections`. Raises UsageError where the input is too small for them.
    """
    if equaliser and spec.domain != "signal":
        raise UsageError("Only a signal has an equaliser", expected="domain signal", found=spec.domain)
    if spec.domain == "text":
        return keyed_maps(key, spec, n, groups, step, context)
    if spec.domain == "tokens":
        return keyed_words(key, spec, n, groups, context)
    while spec.domain != "vector" and n > capacity(spec, kernel_size) and _fits(spec, kernel_size + 2):
        kernel_size += 2
    room = capacity(spec, kernel_size)
    if n > room:
        raise UsageError(
            "The input has too few independent directions for that many bits",
            expected=f"at most {room} directions for inputs {spec.input_shape}",
            found=str(n),
            fix="ask for fewer bits",
        )
    if spec.domain != "vector" and not _fits(spec, kernel_size):
        least = _taps(spec, kernel_size)[0] // 2 + 1
        raise UsageError(
            "The kernel doesn't fit the input",
            expected=f"an odd kernel_size, and inputs of {least} samples or more along each axis",
            found=f"kernel_size={kernel_size} for inputs {spec.input_shape}",
        )
    raw = torch.from_numpy(key.normals("directions", (groups, n, room), context=context))
    basis = orthonormal(raw.transpose(1, 2)).transpose(1, 2)
    if spec.domain == "vector":
        return PatternDirections((basis * room**0.5).float(), step, spec.scale)
    if equaliser:
        half = (basis / 2**0.5).float()
        middle = torch.zeros(groups, n, 1)
        return EqualiserDirections(torch.cat([half.flip(2), middle, half], 2), step)
    channels = spec.input_shape[0] if len(spec.input_shape) > 1 else 1
    taps = _taps(spec, kernel_size)
    rows = basis.reshape(groups, n, channels, -1) @ _whitener(
        channels, taps, _NEIGHBOUR[spec.domain], whitening
    )
    kernels = rows.reshape(groups, n, channels, channels, *taps).float()
    return FilterDirections(kernels, step, spec.scale, relative=spec.domain == "signal")


def _whitener(channels: int, taps: tuple[int, ...], neighbour: float, exponent: float) -> Tensor:
    """Covariance of a natural patch (channels * taps) to the power -exponent/2, float64."""
    grid = torch.stack(torch.meshgrid(*[torch.arange(t) for t in taps], indexing="ij"), -1)
    points = grid.reshape(-1, len(taps)).double()
    space = neighbour ** torch.cdist(points, points)
    colour = torch.full((channels, channels), _CHANNEL, dtype=torch.float64).fill_diagonal_(1.0)
    values, vectors = torch.linalg.eigh(torch.kron(colour, space))
    whitener: Tensor = (vectors * values.clamp_min(1e-9) ** (-exponent / 2)) @ vectors.T
    return whitener
