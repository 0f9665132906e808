"""What an input looks like from afar: the few numbers that keyed features are made of."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from gradmark.protocols import ModelSpec

VIEWS = ("cells", "overall")
_CELLS = 4  # along each axis of an image
_BANDS = 16  # of a signal's spectrum
_HUE, _TEXTURE = 2.0, 0.4  # by which these vary in natural images about as much as brightness does
_LOUD, _WHEN, _LONG, _BRIGHT = 0.3, 8.0, 25.0, 10.0  # by which these vary in recordings about alike
_HEARD = 4
_QUIET = 1e-6


def width_of(spec: ModelSpec, view: str = "cells") -> int:
    """How many numbers a coarse view of an input has; none of words."""
    channels = spec.input_shape[0] if len(spec.input_shape) > 1 else 1
    if spec.domain == "image":
        return channels + 5 if view == "overall" else channels * _CELLS**2
    if spec.domain == "signal":
        return _HEARD if view == "overall" else channels * _BANDS
    return spec.input_shape[0] if spec.domain == "vector" else 0


def coarse(spec: ModelSpec, x: Tensor, view: str = "cells") -> Tensor:
    """What an input (b, *shape) looks like from afar (b, D), float32, and differentiable nowhere.

    Of an image the means of 4 x 4 ``cells`` of each channel; or ``overall``, which hardly knows what lies
    where: brightness, hue (how neighbouring channels differ), the :func:`texture`, and how much brighter the
    upper half is than the lower, and the middle than the whole. Of a signal its amplitude in sixteen equal
    bands, in parts of the whole; or ``overall`` how loud it is, when, for how long, and how often it crosses
    zero. A vector as it is.
    """
    x = x.detach().float()
    if spec.domain == "image":
        x = x.reshape(len(x), -1, *x.shape[-2:])
        return _overall(x) if view == "overall" else F.adaptive_avg_pool2d(x, _CELLS).flatten(1)
    if spec.domain == "signal" and view == "overall":
        return _heard(x.reshape(len(x), -1, x.shape[-1]))
    if spec.domain == "signal":
        energy = torch.fft.rfft(x.reshape(len(x), -1, x.shape[-1])).abs().square()
        bands = F.adaptive_avg_pool1d(energy, _BANDS)
        return (bands / bands.sum(2, keepdim=True).clamp_min(_QUIET)).sqrt().flatten(1)
    return x.flatten(1)


def _overall(x: Tensor) -> Tensor:
    """(b, c, h, w) to (b, c + 5)."""
    means, grey = x.mean((2, 3)), x.mean(1)
    h, w = grey.shape[1:]
    whole = grey.mean((1, 2))
    halves = grey[:, : h - h // 2].mean((1, 2)) - grey[:, h // 2 :].mean((1, 2))
    middle = grey[:, h // 4 : h - h // 4, w // 4 : w - w // 4].mean((1, 2)) - whole
    rows = [whole[:, None], _HUE * means.diff(dim=1), _TEXTURE * texture(x), halves[:, None], middle[:, None]]
    return torch.cat(rows, 1)


def _heard(x: Tensor) -> Tensor:
    """(b, c, t) to (b, 4): the logarithm of the energy, the centre and the spread of the amplitude in time,
    in parts of the whole, and the share of neighbouring samples of unlike sign; channels together."""
    size = x.abs().mean(1)
    share = size / size.sum(1, keepdim=True).clamp_min(_QUIET)
    at = torch.linspace(0, 1, x.shape[2], device=x.device)
    centre = (share * at).sum(1)
    spread = (share * (at - centre[:, None]).square()).sum(1).sqrt()
    crossings = (x[..., 1:].sign() != x[..., :-1].sign()).float().mean((1, 2))
    loud = x.square().mean((1, 2)).clamp_min(_QUIET).log()
    return torch.stack([_LOUD * loud, _WHEN * centre, _LONG * spread, _BRIGHT * crossings], 1)


def texture(x: Tensor) -> Tensor:
    """Of images (b, c, h, w), channels averaged: fineness, slant and contrast (b, 3), float32.

    Logarithms of the total variation, of its share along a row over that along a column, and of the
    standard deviation: what no linear view of an image has.
    """
    grey = x.detach().float().mean(1)
    across, down = (grey.diff(dim=d).abs().mean((1, 2)) for d in (2, 1))
    spread = grey.flatten(1).std(1)
    found = [across + down, across, down, spread]
    fine, across, down, spread = (v.clamp_min(_QUIET).log() for v in found)
    return torch.stack([fine, across - down, spread], 1)
