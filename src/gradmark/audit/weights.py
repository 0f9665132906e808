"""The weights laid bare: do the layers' distributions or spectra give the mark away?"""

from __future__ import annotations

from typing import Any

import torch
from scipy import stats
from torch import Tensor, nn

from gradmark.audit.measure import STRIKING_Z, Z95, Detector, resampling, side_by_side

_AT_MOST = 4000  # weights of a layer that statistics are resampled from
PART = "weights"
SHIFT, SIZE, SHAPE, SPECTRUM = 0.5, 0.3, 0.5, 0.5  # effects that two unmarked trainings may show as well
KOLMOGOROV = 0.2


def layers(module: nn.Module) -> dict[str, Tensor]:
    """Weight matrices by name, float64: (outputs, everything else)."""
    return {
        name: value.detach().cpu().double().flatten(1)
        for name, value in module.named_parameters()
        if value.ndim > 1 and min(value.shape[0], value[0].numel()) > 1
    }


def features(module: nn.Module) -> dict[str, float]:
    """Numbers of one network, for a classifier: each layer's moments and the head of its spectrum."""
    found: dict[str, float] = {}
    for name, w in layers(module).items():
        s = torch.linalg.svdvals(w)
        centred = w - w.mean()
        row = {
            "mean": w.mean() / w.std(),
            "sd": w.std().log(),
            "kurtosis": (centred**4).mean() / w.var() ** 2,
            "largest singular value": s[0].log(),
            "second singular value": s[1].log(),
            "stable rank": s.square().sum() / s[0] ** 2,
            "flatness": (s + 1e-12).log().mean() - s.mean().log(),
        }
        found |= {f"{name}: {what}": float(value) for what, value in row.items()}
    for name, v in (*module.named_parameters(), *module.named_buffers()):
        if v.ndim == 1 and len(v) > 1 and v.is_floating_point():  # biases and what batch norms keep
            v = v.detach().cpu().double()
            found |= {f"{name}: mean": float(v.mean()), f"{name}: sd": float(v.std())}
    return found


def compare_weights(
    model: nn.Module, control: nn.Module, generator: torch.Generator
) -> tuple[list[Detector], dict[str, Any]]:
    """Layer by layer, where both have one of that name and shape; and their spectra, to draw."""
    ours, theirs = layers(model), layers(control)
    found: list[Detector] = []
    spectra = {}
    for name in [n for n in ours if n in theirs and ours[n].shape == theirs[n].shape]:
        a, b = ours[name], theirs[name]
        chosen = torch.randperm(a.numel(), generator=generator)[:_AT_MOST]
        few_a, few_b = a.flatten()[chosen], b.flatten()[chosen]
        weights = resampling(len(chosen), generator).double()
        found += _moments(name, few_a, few_b, weights)
        distance = stats.ks_2samp(few_a.numpy(), few_b.numpy())
        found.append(
            Detector(
                f"{name}: Kolmogorov distance", PART, "white", 0.0, 1.63 * (2 / len(chosen)) ** 0.5,
                KOLMOGOROV, bool(distance.statistic > KOLMOGOROV and distance.pvalue < 1e-4),
                float(distance.statistic), 0.0, float(distance.statistic), note="interval: chance, at 99 %",
            )
        )  # fmt: skip
        s, t = torch.linalg.svdvals(a), torch.linalg.svdvals(b)
        spectra[name] = (s, t)
        found.append(_ratio(f"{name}: largest singular value", s[0], t[0]))
        found.append(_ratio(f"{name}: largest over median", s[0] / s.median(), t[0] / t.median()))
        found.append(_ratio(f"{name}: stable rank", *(v.square().sum() / v[0] ** 2 for v in (s, t))))
    return found, spectra


def _moments(name: str, a: Tensor, b: Tensor, weights: Tensor) -> list[Detector]:
    """Mean, spread and kurtosis; resampled over weights, which tells size of layer, not of training."""
    (mean_a, var_a, kurt_a), (mean_b, var_b, kurt_b) = (_central(v, weights) for v in (a, b))
    shift = (mean_a - mean_b) / var_b.sqrt()
    effect, z = float(shift[0]), float(shift[0] / shift[1:].std().clamp_min(1e-9))
    half = Z95 * float(mean_b[1:].std())
    mean = Detector(
        f"{name}: mean", PART, "white", float(mean_b[0]) - half, float(mean_b[0]) + half, SHIFT,
        abs(effect) > SHIFT and abs(z) > STRIKING_Z, float(mean_a[0]), float(mean_b[0]), effect, z,
        note="effect in the control's standard deviations",
    )  # fmt: skip
    return [
        mean,
        side_by_side(f"{name}: standard deviation", PART, var_a.sqrt(), var_b.sqrt(), SIZE),
        side_by_side(f"{name}: kurtosis", PART, kurt_a, kurt_b, SHAPE),
    ]


def _central(v: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, variance and kurtosis (1 + B,) of the weights ``v``, for each resample."""
    v = v - (start := v.mean())
    m1, m2, m3, m4 = (weights @ v**k for k in (1, 2, 3, 4))
    var = (m2 - m1**2).clamp_min(1e-24)
    return start + m1, var, (m4 - 4 * m1 * m3 + 6 * m1**2 * m2 - 3 * m1**4) / var**2


def _ratio(name: str, a: Tensor, b: Tensor) -> Detector:
    effect = float((a / b).log())
    return Detector(
        name, PART, "white", float(b), float(b), SPECTRUM, abs(effect) > SPECTRUM, float(a), float(b), effect,
        note="no spread is known from one control",
    )  # fmt: skip
