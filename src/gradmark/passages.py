"""What a traced network is made of: its layers that mix channels, and what lies between them.

A *passage* leads from one layer to the next one that mixes channels, through nothing but things that treat
every channel by itself. Passages are found by tracing with ``torch.fx``, so any module that can be traced
will do. :mod:`gradmark.rewiring` says what may be done to their channels.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.passes.shape_prop import ShapeProp, TensorMetadata

from gradmark.errors import AttackError
from gradmark.suspects.checks import brief
from gradmark.suspects.module import fed, undisturbed

EXAMPLES = 3
_AXES = ("1d", "2d", "3d")
_POOLS = {f"{kind}pool{axes}" for kind in ("avg", "adaptiveavg") for axes in _AXES}
_TOPS = {f"{kind}pool{axes}" for kind in ("max", "adaptivemax") for axes in _AXES}
_SHAPES = {"flatten", "view", "reshape"}
LINEAR = {"identity", "contiguous", "clone", "dropout", "alphadropout", "mean"} | _POOLS | _SHAPES
LINEAR |= {f"dropout{axes}" for axes in _AXES}
POSITIVE = {"relu", "leakyrelu"} | _TOPS
"""f(s x) = s f(x) for s > 0."""
ODD = {"tanh", "softsign", "tanhshrink", "softshrink", "hardshrink"}
"""f(-x) = -f(x)."""
OTHER = {"gelu", "silu", "sigmoid", "elu", "selu", "celu", "softplus", "mish", "relu6", "hardtanh"}
OTHER |= {"hardswish", "hardsigmoid", "logsigmoid"}
KNOWN = LINEAR | POSITIVE | ODD | OTHER

Mixer = nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d
Norm = nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d


@dataclass(frozen=True)
class Passage:
    """Names of the modules that share channels, in their order in the network.

    ``spread``: how many inputs of ``consumer`` each channel of ``producer`` becomes (more than one after
    a flattening). ``scalable``, ``odd``: whether a positive factor, a sign pass from the last of producer
    and norms to the consumer.
    """

    producer: str
    norms: tuple[str, ...]
    consumer: str
    spread: int = 1
    scalable: bool = True
    odd: bool = True


def passages(model: nn.Module, x: Tensor) -> list[Passage]:
    """All passages of ``model``; ``x`` (n, *shape) are some inputs.

    Raises AttackError where the model can't be traced.
    """
    net = TracedNet(model, x)
    return [passage for node in net.mixers if (passage := net.follow(node)) is not None]


def pairs(model: nn.Module, x: Tensor) -> list[tuple[str, str]]:
    """Names of each layer whose output goes to a BatchNorm and nowhere else, and of that BatchNorm.

    Raises AttackError where the model can't be traced.
    """
    net = TracedNet(model, x)
    followers = [(node, net.user(node)) for node in net.mixers]
    return [(str(a.target), str(b.target)) for a, b in followers if b is not None and net.norm(a, b)]


class TracedNet:
    """A traced model with the shape of every tensor in it."""

    def __init__(self, model: nn.Module, x: Tensor) -> None:
        try:
            with torch.no_grad(), undisturbed(model):
                self.graph = fx.symbolic_trace(model)
                ShapeProp(self.graph).propagate(fed(model, x[:EXAMPLES]))
        except Exception as cause:  # fx raises whatever a model's own code raises on a proxy
            raise AttackError("torch.fx can't trace this model", found=brief(cause)) from cause
        self.parts = dict(self.graph.named_modules())
        calls = Counter(str(n.target) for n in self.graph.graph.nodes if n.op == "call_module")
        fetched = {str(n.target).rpartition(".")[0] for n in self.graph.graph.nodes if n.op == "get_attr"}
        uses = Counter(id(p) for part in model.modules() for p in part._parameters.values() if p is not None)
        self.own = {
            name
            for name, part in self.parts.items()
            if calls[name] == 1 and name not in fetched
            and all(p is None or uses[id(p)] == 1 for p in part._parameters.values())
        }  # fmt: skip
        self.mixers = [n for n in self.graph.graph.nodes if self._is_mixer(n)]

    def part(self, node: fx.Node) -> nn.Module | None:
        """The module that ``node`` calls, if it calls it alone and nobody else has its weights."""
        return self.parts[str(node.target)] if node.op == "call_module" and node.target in self.own else None

    def _is_mixer(self, node: fx.Node) -> bool:
        part = self.part(node)
        if not isinstance(part, Mixer) or "weight" not in part._parameters or getattr(part, "groups", 1) > 1:
            return False
        shape = shape_of(node)
        return bool(shape) and (isinstance(part, nn.Linear) or len(shape) == part.weight.ndim)

    def axis(self, node: fx.Node) -> int:
        """Where a layer's output has its channels."""
        return len(shape_of(node)) - 1 if isinstance(self.part(node), nn.Linear) else 1

    def user(self, node: fx.Node) -> fx.Node | None:
        """The only thing that uses the values of ``node``, where that is one thing."""
        users = [u for u in node.users if not _asks_shape(u)]
        if len(users) != 1 or users[0].all_input_nodes.count(node) != 1:
            return None
        return users[0] if users[0].args and users[0].args[0] is node else None

    def norm(self, before: fx.Node, node: fx.Node) -> bool:
        """Whether ``node`` is a BatchNorm of the channels of the layer ``before``."""
        return isinstance(self.part(node), Norm) and self.axis(before) == 1

    def follow(self, start: fx.Node) -> Passage | None:
        """The passage from the layer at ``start``, if one leads from there."""
        axis, width = self.axis(start), shape_of(start)[self.axis(start)]
        norms: list[str] = []
        spread, scalable, odd, here = 1, True, True, start
        while (node := self.user(here)) is not None:
            part, shape = self.part(node), shape_of(node)
            if node in self.mixers:
                at = len(shape_of(here)) - 1 if isinstance(part, nn.Linear) else 1
                fits = at == axis and (spread == 1 or isinstance(part, nn.Linear))
                names = str(start.target), tuple(norms), str(node.target)
                return Passage(*names, spread, scalable, odd) if fits else None
            if isinstance(part, Norm):
                if axis != 1 or spread > 1:
                    return None
                norms.append(str(node.target))
                scalable = odd = part.affine
            elif (kind := self.kind(node)) and keeps(kind, node, shape_of(here), shape, axis):
                spread = math.prod(shape[1:]) // width if axis == 1 and len(shape) == 2 else spread
                scalable &= kind in LINEAR | POSITIVE
                odd &= kind in LINEAR | ODD
            else:
                return None
            here = node
        return None

    def kind(self, node: fx.Node) -> str:
        """The common name of a module, function or method, or nothing where it isn't known."""
        if node.op == "call_module":
            part = self.parts[str(node.target)]
            name = type(part).__name__ if type(part).__module__.startswith("torch.nn") else ""
        else:
            target: str | Callable[..., Any] = node.target
            name = target if isinstance(target, str) else getattr(target, "__name__", "")
        name = name.replace("_", "").lower()
        return name if name in KNOWN and node.op.startswith("call") else ""


def keeps(kind: str, node: fx.Node, before: tuple[int, ...], after: tuple[int, ...], axis: int) -> bool:
    """Whether the channels on ``axis`` stay apart, in their order, and on their axis."""
    if kind in _SHAPES:
        flat = axis == 1 and len(after) == 2 and math.prod(before[1:]) == after[1]
        return after == before or (flat and after[0] == before[0])
    if kind in _POOLS | _TOPS:
        return axis == 1 and len(before) == int(kind[-2]) + 2 and after[:2] == before[:2]
    if kind == "mean":
        axes = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else ())
        listed = axes if isinstance(axes, (tuple, list)) else (axes,)
        inner = all(isinstance(a, int) and a % len(before) > 1 for a in listed)
        return axis == 1 and bool(listed) and inner and after[:2] == before[:2]
    return after == before


def _asks_shape(node: fx.Node) -> bool:
    return node.target in ("size", "dim") or (node.target is getattr and node.args[1] in ("shape", "ndim"))


def shape_of(node: fx.Node) -> tuple[int, ...]:
    """The shape of a node's tensor; empty where it isn't one."""
    meta = node.meta.get("tensor_meta")
    return tuple(meta.shape) if isinstance(meta, TensorMetadata) else ()
