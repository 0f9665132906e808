"""Keyed secret inputs: smooth noise that a network can be asked about but never meets by chance."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from gradmark.errors import UsageError
from gradmark.keys import OwnerKey, check_amount
from gradmark.protocols import ModelSpec

_COARSE = {"image": 4, "signal": 32}  # independent values along each axis, at most
PATTERNS = ("smooth", "two-tone")
_LOUDNESS = 0.1  # of a signal, relative to half its range: that of natural sound


def smooth_noise(key: OwnerKey, spec: ModelSpec, n: int, *, purpose: str, context: bytes) -> Tensor:
    """(n, *shape) float32 with zero mean and unit root mean square each: smooth for images and
    signals, white for vectors."""
    shape = spec.input_shape
    if spec.domain in ("text", "tokens"):
        raise UsageError(
            "There is no smooth noise of words", expected="image, signal or vector", found=spec.domain
        )
    if spec.domain == "vector":
        noise = torch.from_numpy(key.normals(purpose, (n, *shape), context=context))
    else:
        axes = 2 if spec.domain == "image" else 1
        channels = shape[0] if len(shape) > axes else 1
        coarse = tuple(max(1, min(_COARSE[spec.domain], size // 2)) for size in shape[-axes:])
        values = torch.from_numpy(key.normals(purpose, (n, channels, *coarse), context=context))
        mode = "bilinear" if axes == 2 else "linear"
        noise = F.interpolate(values, shape[-axes:], mode=mode, align_corners=True).reshape(n, *shape)
    flat = noise.flatten(1)
    flat = flat - flat.mean(1, keepdim=True) if flat.shape[1] > 1 else flat
    flat = flat / flat.square().mean(1, keepdim=True).sqrt().clamp_min(1e-12)
    return flat.float().reshape(n, *shape)


def secret_inputs(
    key: OwnerKey, spec: ModelSpec, n: int, *, purpose: str, context: bytes, pattern: str = "smooth"
) -> Tensor:
    """(n, *shape) legal inputs made of :func:`smooth_noise`.

    A quarter of the range about its middle for images and bounded vectors, a tenth of full loudness
    for signals, one natural unit for what is unbounded. Of tokens: rows of any, one after the other.
    ``pattern``: ``two-tone`` leaves the noise's sign, at twice that size: every pixel is at one bound or
    the other, further from what blur and weak contrast make of natural inputs.
    """
    check_amount(n * math.prod(spec.input_shape))
    if pattern not in PATTERNS:
        raise UsageError("No such pattern of secret inputs", expected=" or ".join(PATTERNS), found=pattern)
    if spec.domain == "tokens":
        words = key.integers(purpose, n * spec.input_shape[0], spec.levels or 1, context=context)
        return torch.from_numpy(words).reshape(n, *spec.input_shape).float()
    noise = smooth_noise(key, spec, n, purpose=purpose, context=context)
    middle, size = 0.0, spec.scale * (_LOUDNESS if spec.domain == "signal" else 1.0)
    if spec.low is not None and spec.high is not None:
        middle, half = (spec.low + spec.high) / 2, (spec.high - spec.low) / 2
        size = half * (_LOUDNESS if spec.domain == "signal" else 0.5)
    if pattern == "two-tone":
        noise = torch.where(noise > 0, 2.0, -2.0)
    return spec.snap(middle + size * noise)
