"""Which neurons of a network may be permuted, scaled, flipped or doubled without changing its function.

The channels of a passage (:mod:`gradmark.passages`) have no identity: they may be renamed and rescaled at
will, as long as both ends agree.
"""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor, nn

from gradmark.errors import AttackError
from gradmark.passages import EXAMPLES, Mixer, Norm, Passage
from gradmark.suspects.checks import brief, unwrap
from gradmark.suspects.module import fed, undisturbed

PASSAGE = "two layers with activations, pooling or batch norm alone between them"

T = TypeVar("T")


def need(found: list[T], expected: str) -> list[T]:
    """``found`` itself. Raises AttackError where it is empty."""
    if not found:
        raise AttackError("Nothing in this model can be rewritten", expected=expected)
    return found


def select(model: nn.Module, passage: Passage, index: Tensor) -> None:
    """Let ``index`` (m,) choose the passage's channels, in place: ``m`` may be more or fewer than there were.

    The consumer's incoming weights are chosen alike, so a channel chosen twice counts twice.
    """
    producer, consumer = mixer(model, passage.producer), mixer(model, passage.consumer)
    width = len(producer.weight)
    for part in (producer, *(model.get_submodule(name) for name in passage.norms)):
        for table in (part._parameters, part._buffers):
            for name, value in table.items():
                if value is not None and value.ndim:
                    _put(part, name, value.detach()[index.to(value.device)])
    old = incoming(consumer, width)[:, index.to(consumer.weight.device)]
    shape = list(consumer.weight.shape)
    shape[1] = shape[1] // width * len(index)
    _put(consumer, "weight", old.reshape(shape))
    for part in (producer, consumer, *(model.get_submodule(name) for name in passage.norms)):
        _resize(part)


def multiply(model: nn.Module, passage: Passage, factors: Tensor) -> None:
    """Multiply what goes through the passage by ``factors`` (channels,), and divide at its end; in place."""
    last = norm(model, passage.norms[-1]) if passage.norms else mixer(model, passage.producer)
    consumer = mixer(model, passage.consumer)
    with torch.no_grad():
        for value in (last.weight, last.bias):
            if isinstance(value, Tensor):
                value.mul_(column(factors, value))
        weights = incoming(consumer, len(factors)) / factors.to(consumer.weight).reshape(1, -1, 1)
        consumer.weight.copy_(weights.reshape(consumer.weight.shape))


def incoming(consumer: Mixer, width: int) -> Tensor:
    """A consumer's weights as (outputs, ``width`` channels, weights for each channel)."""
    return consumer.weight.detach().reshape(len(consumer.weight), width, -1)


def column(factors: Tensor, like: Tensor) -> Tensor:
    """``factors`` (channels,), shaped to multiply the first axis of ``like``."""
    return factors.to(like).reshape(-1, *[1] * (like.ndim - 1))


def mixer(model: nn.Module, name: str) -> Mixer:
    """The layer of this name."""
    found = model.get_submodule(name)
    if not isinstance(found, Mixer):
        raise AttackError("Not a layer that mixes channels", found=f"{name}: {type(found).__name__}")
    return found


def norm(model: nn.Module, name: str) -> Norm:
    """The BatchNorm of this name."""
    found = model.get_submodule(name)
    if not isinstance(found, Norm):
        raise AttackError("Not a batch norm", found=f"{name}: {type(found).__name__}")
    return found


def unchanged(model: nn.Module, twin: nn.Module, x: Tensor) -> nn.Module:
    """``twin`` in eval mode. Raises AttackError where its scores aren't those of ``model`` on ``x``."""
    twin.eval()
    try:
        a, b = (_scores(m, x) for m in (model, twin))
    except Exception as cause:  # a forward that fixes a width by a number fails as it likes
        raise AttackError("The rewritten model fails", found=brief(cause)) from cause
    loose = 1e-3 if a.dtype in (torch.float32, torch.float64) else 0.1
    if a.shape != b.shape or not bool(((a - b).abs() <= loose * a.abs().max()).all()):
        fix = "The model uses its layers in a way that tracing doesn't show"
        raise AttackError("The rewriting would change the model's function", fix=fix)
    return twin


def _scores(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad(), undisturbed(model):
        scores: Tensor = unwrap(model(fed(model, x[:EXAMPLES])))
        return scores


def _put(part: nn.Module, name: str, value: Tensor) -> None:
    old = part._parameters.get(name)
    if old is None:
        part._buffers[name] = value.clone()
    else:
        part._parameters[name] = nn.Parameter(value.clone(), requires_grad=old.requires_grad)


def _resize(part: nn.Module) -> None:
    """Make a module's own record of its width agree with its tensors."""
    if isinstance(part, Norm):
        part.num_features = next((len(t) for t in (*part.parameters(), *part.buffers()) if t.ndim), 0)
    elif isinstance(part, nn.Linear):
        part.out_features, part.in_features = part.weight.shape
    elif isinstance(part, Mixer):
        part.out_channels, part.in_channels = part.weight.shape[:2]
