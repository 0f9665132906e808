"""A network's chains of layers with nothing but hidden units between them."""

from __future__ import annotations

from collections.abc import Mapping
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from gradmark.errors import AttackError, MismatchError
from gradmark.rewiring import pairs, passages

Chain = tuple[tuple[str, ...], ...]
"""For each layer, in order: its name and those of the BatchNorms right behind it."""

_EPS = 1e-5  # of a BatchNorm: its default
_KNOWN: WeakKeyDictionary[nn.Module, tuple[Chain, ...]] = WeakKeyDictionary()


def layer_chains(model: nn.Module, x: Tensor) -> tuple[Chain, ...]:
    """The longest runs of two layers and more whose inner channels are hidden units; ``x`` (n, *shape).

    A residual block gives one, a network without shortcuts is one. Raises MismatchError where there is
    none, or the model can't be traced. Looked up but once for each module.
    """
    if model not in _KNOWN:
        _KNOWN[model] = _found(model, x)
    return _KNOWN[model]


def _found(model: nn.Module, x: Tensor) -> tuple[Chain, ...]:
    try:
        following = {p.producer: p for p in passages(model, x)}
        norms = dict(pairs(model, x))
    except AttackError as cause:
        expected = "a model that torch.fx can trace"
        raise MismatchError("Hidden units can't be told", expected=expected, found=str(cause)) from cause
    inner = {p.consumer for p in following.values()}
    chains: list[Chain] = []
    for first in (name for name in following if name not in inner):
        links, here = [], first
        while here in following:
            links.append((here, *following[here].norms))
            here = following[here].consumer
        chains.append((*links, (here, *((norms[here],) if here in norms else ()))))
    if not chains:
        raise MismatchError(
            "The model has no hidden units between two layers",
            expected="two layers with activations, pooling or batch norm alone between them",
            found=type(model).__name__,
        )
    return tuple(chains)


def steps(tensors: Mapping[str, Tensor], chain: Chain, owner: str) -> list[tuple[Tensor, Tensor | None]]:
    """Each layer's weights as (outputs, inputs, positions), and its norms' factor (outputs,) or None.

    ``tensors``: parameters and buffers by name. A norm that isn't there has been folded away. Raises
    MismatchError where a layer is absent or doesn't fit the one before it.
    """
    found: list[tuple[Tensor, Tensor | None]] = []
    for name, *norms in chain:
        w = tensors.get(f"{name}.weight")
        width = len(found[-1][0]) if found else (w.shape[1] if w is not None and w.ndim > 1 else 0)
        if w is None or w.ndim < 2 or not width or w[0].numel() % width:
            raise MismatchError(
                f"A layer is missing or reshaped in {owner}",
                expected=f"{name}.weight" + (f" with {width} inputs" if found else ""),
                found="nothing" if w is None else str(tuple(w.shape)),
            )
        factors = [f for norm in norms if (f := _factor(tensors, norm)) is not None]
        if any(len(f) != len(w) for f in factors):
            expected = f"{len(w)} channels"
            raise MismatchError(f"A norm in {owner} doesn't fit", expected=expected, found=", ".join(norms))
        found.append((w.reshape(len(w), width, -1), torch.stack(factors).prod(0) if factors else None))
    return found


def _factor(tensors: Mapping[str, Tensor], norm: str) -> Tensor | None:
    """gamma / sqrt(var + eps) of the BatchNorm of this name, as far as it has them."""
    scale, variance = tensors.get(f"{norm}.weight"), tensors.get(f"{norm}.running_var")
    if variance is None:
        return scale
    return (variance + _EPS).rsqrt() * (1.0 if scale is None else scale)
