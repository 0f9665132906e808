"""scikit-learn's 8x8 digits: the task that runs everywhere, in seconds."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from gradmark.bench.experiment import Experiment, Marking, Means
from gradmark.bench.networks import DigitsMLP, DigitsNet
from gradmark.data import Data, load_data
from gradmark.embed import Recipe
from gradmark.views import Classification

LOCAL_SCHEMES = ("probe-gradient", "weights", "path-weights", "trigger", "margin-trigger")
LOCAL = {"carriers": 64, "every": 1}
MARKER = {"target_log10_p": -18.0, "budget": 0.5, **LOCAL}
SIGNED = {"budget": 0.5, "new_heads": True, **LOCAL}
SOFT = {"smoothing": 0.1}
# As gentle as the others it doesn't embed: its settings are the gentlest of six that placed every bit.
GRADSIGNS = {"method": "exact", "margin": 1.0, "strength": 1.0, "target_log10_p": -18.5, **LOCAL}


def digits() -> Data:
    return load_data("digits")


def textures(data: Data, n: int, generator: torch.Generator) -> Tensor:
    """Smooth random strokes (n, *shape): blurred noise with a digit's contrast, no digit anywhere."""
    channels, height, width = data.spec.input_shape
    coarse = torch.randn((n, channels, 5, 5), generator=generator)
    smooth = F.interpolate(coarse, (height, width), mode="bicubic", align_corners=True)
    return data.spec.snap((0.3 + 0.6 * smooth).clamp(0, 1))


def experiment() -> Experiment:
    """25 epochs from scratch; the settings of ``gradmark demo``."""
    return Experiment(
        task=Classification("digits", digits, DigitsNet),
        other=DigitsMLP,
        recipe=Recipe(epochs=25),
        surrogate=textures,
        marking=Marking({}, MARKER),
        markings={
            "filter-gradient": Marking({"bits": 128, "kernel_size": 5, "step": 0.1}, MARKER),
            "ensemble": Marking({"bits": 128, "kernel_size": 5, "step": 0.1}, SIGNED, SOFT),
            "gradsigns": Marking({"step": 0.1}, GRADSIGNS),
            **{name: Marking({}, LOCAL) for name in LOCAL_SCHEMES},
        },
        means=Means(lr=0.01),
    )
