"""A network's chains of layers with nothing but hidden units between them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from gradmark.errors import AttackError, MismatchError
from gradmark.passages import pairs, passages
from gradmark.suspects.module import fed

Chain = tuple[tuple[str, ...], ...]
"""For each layer, in order: its name and those of the BatchNorms right behind it."""

Layer = tuple[Tensor, Tensor | None]
"""Weights as (outputs, inputs, positions), and the norms' factor (outputs,) if there is one."""

_EPS = 1e-5  # of a BatchNorm that doesn't say
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


def steps(tensors: Mapping[str, Tensor], chain: Chain, owner: str) -> list[Layer]:
    """The layers of a chain.

    ``tensors``: parameters and buffers by name, and :func:`constants`. A norm that isn't there has been
    folded away. Raises MismatchError where a layer is absent or doesn't fit the one before it.
    """
    found: list[Layer] = []
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


def constants(model: nn.Module) -> dict[str, Tensor]:
    """What the norms of ``model`` add to their variances, as ``NAME.eps``."""
    return {f"{name}.eps": torch.tensor(m.eps, dtype=torch.float64)
            for name, m in model.named_modules() if isinstance(m, _BatchNorm)}  # fmt: skip


def slopes(model: nn.Module, chains: tuple[Chain, ...], x: Tensor, owner: str) -> list[list[Tensor]]:
    """For each chain and each layer of it but the last: by how much (units,) what the next layer takes in
    follows what each unit gives out, in the mean over the inputs ``x`` (n, *shape) and positions.

    The slope of a regression: for a ReLU the share of inputs at which it is on, if they are Gaussian (Stein's
    identity), and 0 for a unit that is never on. Where pooling lies between, of the means over positions.
    Differentiable in the weights; the model runs in its own mode. Raises MismatchError where a layer is
    absent.
    """
    ends = {
        (c, i): (chain[i][-1], chain[i + 1][0])
        for c, chain in enumerate(chains)
        for i in range(len(chain) - 1)
    }
    given: dict[tuple[int, int], Tensor] = {}
    taken: dict[tuple[int, int], Tensor] = {}
    with ExitStack() as stack:
        for place, (giver, taker) in ends.items():
            first, second = (_part(model, name, owner) for name in (giver, taker))
            stack.callback(first.register_forward_hook(_keep(given, place)).remove)
            stack.callback(second.register_forward_pre_hook(_keep(taken, place)).remove)
        model(fed(model, x))
    if len(given) + len(taken) < 2 * len(ends):
        raise MismatchError(
            f"{owner} doesn't use all of its layers", expected=f"{2 * len(ends)} of them to be asked"
        )
    return [
        [_slope(given[c, i], taken[c, i]) for i in range(len(chain) - 1)] for c, chain in enumerate(chains)
    ]


def _part(model: nn.Module, name: str, owner: str) -> nn.Module:
    try:
        return model.get_submodule(name)
    except AttributeError as cause:
        fix = "Give the model as a PyTorch module of the marked architecture"
        raise MismatchError(
            f"A layer is missing in {owner}", expected=name, found=type(model).__name__, fix=fix
        ) from cause


def _keep(table: dict[tuple[int, int], Tensor], place: tuple[int, int]) -> Callable[..., None]:
    """A hook that keeps what a module gives out, or takes in, as (units, n, positions)."""

    def hook(module: nn.Module, taken: tuple[Tensor, ...], out: Tensor | None = None) -> None:
        value = taken[0] if out is None else out
        value = value if value.dtype == torch.float64 else value.float()
        last = isinstance(module, nn.Linear)
        value = value.movedim(-1 if last else 1, 0)
        table[place] = value.reshape(*value.shape[:2], -1)

    return hook


def _slope(given: Tensor, taken: Tensor) -> Tensor:
    """Of the regression (units,) of ``taken`` on ``given``, both (units, n, positions)."""
    n = given.shape[1]
    taken = taken.reshape(len(given), -1, n, taken[0, 0].numel()).movedim(2, 1).flatten(2)
    if given[0].shape != taken[0].shape:
        given, taken = (v.mean(2, keepdim=True) for v in (given, taken))
    level = given.detach().flatten(1).abs().amax(1, keepdim=True)
    given, taken = (v.flatten(1) - v.flatten(1).mean(1, keepdim=True) for v in (given, taken))
    size = given.detach().abs().amax(1, keepdim=True)  # units may be scaled to where squares underflow
    still = size <= 1e-6 * level
    given, taken = (v / size.masked_fill(still, 1.0) for v in (given, taken))
    return (given * taken).sum(1) / given.square().sum(1).masked_fill(still[:, 0], 1.0)


def _factor(tensors: Mapping[str, Tensor], norm: str) -> Tensor | None:
    """gamma / sqrt(var + eps) of the BatchNorm of this name, as far as it has them."""
    scale, variance = tensors.get(f"{norm}.weight"), tensors.get(f"{norm}.running_var")
    if variance is None:
        return scale
    eps = float(tensors.get(f"{norm}.eps", _EPS))
    return (variance + eps).rsqrt() * (1.0 if scale is None else scale)
