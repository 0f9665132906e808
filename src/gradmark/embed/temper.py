"""Confidence put right after training: a temperature, folded into the last layer.

Label smoothing keeps a marked model's confidence below its accuracy. One factor on all logits mends
that (Guo et al., On Calibration of Modern Neural Networks, ICML 2017) and changes no prediction; readings
taken from logits grow by that factor, so a mark's evidence stays. The factor is chosen on training inputs,
so that the mean confidence there is the unmarked control's: no held-out label is spent.
"""

from __future__ import annotations

from typing import Any

import torch
from scipy.optimize import brentq
from torch import Tensor, nn

from gradmark.data import Split
from gradmark.embed.heads import output_layer
from gradmark.errors import ModelError
from gradmark.suspects import ModuleSuspect
from gradmark.suspects.checks import device_of
from gradmark.suspects.module import undisturbed

INPUTS = 5000
_RANGE = 1e-3, 1e4  # of the factor


def confidence_of(model: nn.Module, data: Split) -> float:
    """Mean probability of the predicted class on the first inputs of ``data``."""
    return _confidence(_scores(model, data), 1.0)


def temper(model: nn.Module, data: Split, confidence: float) -> float:
    """Scale the last layer, in place, until the mean confidence on ``data`` is ``confidence``.

    Returns the factor. Raises ModelError where the scores aren't the very output of a linear or
    convolutional layer, or where no factor gives that confidence.
    """
    layer, scores = _last_layer(model, data.batch(slice(0, 2))[0]), _scores(model, data)
    low, high = (_confidence(scores, factor) - confidence for factor in _RANGE)
    if not low < 0 < high:
        raise ModelError("No temperature gives the model the control's confidence", found=f"{confidence:.3f}")
    factor = float(brentq(lambda k: _confidence(scores, k) - confidence, *_RANGE, xtol=1e-4))
    with torch.no_grad():
        layer.weight.mul_(factor)
        if layer.bias is not None:
            layer.bias.mul_(factor)
    return factor


def _scores(model: nn.Module, data: Split) -> Tensor:
    return ModuleSuspect(model).query(data.batch(slice(0, INPUTS))[0]).double()


def _confidence(scores: Tensor, factor: float) -> float:
    return float((factor * scores).softmax(1).amax(1).mean())


def _last_layer(model: nn.Module, x: Tensor) -> Any:
    """The layer whose output is the model's, and linear in its weight."""
    with undisturbed(model):
        layer = output_layer(model, x.to(device_of(model)))
    if layer is None or not _once(model, layer):
        raise ModelError(
            "The temperature has no layer to go into",
            expected="scores that come straight from a linear or convolutional layer of weights of its own",
            fix="Leave --calibrate out, and divide the scores where the model is served",
        )
    return layer


def _once(model: nn.Module, layer: nn.Module) -> bool:
    """Whether no other layer holds this one's weights."""
    own = {id(p) for p in layer.parameters(recurse=False)}
    others = (m for m in model.modules() if m is not layer)
    return not any(id(p) in own for m in others for p in m.parameters(recurse=False))
