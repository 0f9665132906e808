"""Renaming every channel that has no name: hidden units, and the streams that shortcuts keep together.

A residual stream's channels pass from block to block by their place, so :mod:`gradmark.rewiring` leaves
them alone. Here every channel is followed through the traced network, and those that an addition brings
together are one; whatever isn't tied to an input, a score or something unknown may be renamed, as long as
all that write or read it agree (Ainsworth, Hayase and Srinivasa, ICLR 2023).
"""

from __future__ import annotations

import operator
from collections import defaultdict
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from gradmark.passages import Norm, TracedNet, keeps, shape_of

Slot = tuple[str, str]
"""A module's name and which of its axes: ``rows``, ``columns`` or, of a norm, ``norm``."""
Channels = list[int | None]
"""For each place its channel's number; None where there is nothing but zeros."""

_ADDS = {operator.add, operator.iadd, torch.add}
_NUMBERS = _ADDS | {operator.sub, operator.mul, operator.truediv, torch.sub, torch.mul, torch.div}
"""Each of a tensor and a number leaves channels where they are."""


def orders(model: nn.Module, x: Tensor, generator: torch.Generator) -> dict[Slot, Tensor]:
    """A random renaming of all channels: for each module's axis the old place (width,) of each new one.

    ``x`` (n, *shape) are some inputs. Raises AttackError where the model can't be traced.
    """
    followed = _Followed(TracedNet(model, x))
    fixed = followed.fixed()
    slots = {slot: [followed.root(c) for c in row] for slot, row in followed.slots.items()}
    where: dict[int, list[Slot]] = defaultdict(list)
    for slot, row in slots.items():
        for channel in row:
            if channel is not None:
                where[channel].append(slot)
    alike: dict[tuple[Slot, ...], list[int]] = defaultdict(list)
    for channel, places in where.items():
        if channel not in fixed:
            alike[tuple(places)].append(channel)
    renamed: dict[int, int] = {}
    for channels in alike.values():
        shuffled = torch.randperm(len(channels), generator=generator).tolist()
        renamed |= {channel: channels[i] for channel, i in zip(channels, shuffled, strict=True)}
    return {slot: _order(row, renamed) for slot, row in slots.items()}


def rename(model: nn.Module, found: dict[Slot, Tensor]) -> None:
    """Put every module's weights in their new order, in place."""
    for (name, axis), order in found.items():
        part = model.get_submodule(name)
        tensors = [*part._parameters.items(), *part._buffers.items()]
        with torch.no_grad():
            for kind, value in tensors:
                if value is None or not value.ndim or (axis == "columns" and kind != "weight"):
                    continue
                index = order.to(value.device)
                value.copy_(value[:, index] if axis == "columns" else value[index])


def _order(row: Channels, renamed: dict[int, int]) -> Tensor:
    """Where each place of an axis takes its weights from."""
    places: dict[int, list[int]] = defaultdict(list)
    for place, channel in enumerate(row):
        if channel is not None:
            places[channel].append(place)
    index = list(range(len(row)))
    for channel, own in places.items():
        for to, source in zip(own, places[renamed.get(channel, channel)], strict=True):
            index[to] = source
    return torch.tensor(index)


class _Followed:
    """Every channel's way through a traced network."""

    def __init__(self, net: TracedNet) -> None:
        self.net, self.slots = net, dict[Slot, Channels]()
        self._up: list[int] = []
        self._tied: set[int] = set()
        self._known: dict[fx.Node, Channels | None] = {}
        self._axis: dict[fx.Node, int] = {}
        for node in net.graph.graph.nodes:
            self._known[node] = self._after(node)

    def root(self, channel: int | None) -> int | None:
        """The one number of all channels that are the same."""
        while channel is not None and self._up[channel] != channel:
            channel = self._up[channel]
        return channel

    def fixed(self) -> set[int | None]:
        """Channels that have a name, or whose use isn't understood."""
        return {self.root(channel) for channel in self._tied}

    def _after(self, node: fx.Node) -> Channels | None:
        """The channels of a node's values; None where there are none, or they can't be told."""
        net, given = self.net, [self._known[n] for n in node.all_input_nodes]
        first = given[0] if given else None
        part, shape = net.part(node), shape_of(node)
        axes = {self._axis.get(n, 1) for n in node.all_input_nodes}
        self._axis[node] = axis = min(axes, default=1)
        if node in net.mixers:
            if first is None or len(first) != part.weight.shape[1] or axis != self._reads(node):  # type: ignore[union-attr, index]
                self._tie(first or [])
            else:
                self.slots[str(node.target), "columns"] = first
            self._axis[node] = net.axis(node)
            rows = self.slots[str(node.target), "rows"] = self._new(shape[self._axis[node]])
            return rows
        if node.op == "placeholder":
            return self._tie(self._new(shape[1])) if len(shape) > 1 else None
        if first is not None and isinstance(part, Norm) and len(first) == part.num_features and axis == 1:
            self.slots[str(node.target), "norm"] = first
            return first
        other = given[1] if len(given) == 2 else None
        shapes = {shape_of(n) for n in node.all_input_nodes}
        together = node.target in _ADDS and shapes == {shape} and len(axes) == 1
        if first is not None and other is not None and together and len(first) == len(other):
            return [self._same(a, b) for a, b in zip(first, other, strict=True)]
        if first is not None and len(given) == 1 and (kept := self._kept(node, first, axis)) is not None:
            return kept
        for channels in given:
            self._tie(channels or [])
        return None

    def _reads(self, node: fx.Node) -> int:
        """Which axis of its input a layer mixes."""
        linear = isinstance(self.net.part(node), nn.Linear)
        return len(shape_of(node.all_input_nodes[0])) - 1 if linear else 1

    def _kept(self, node: fx.Node, first: Channels, axis: int) -> Channels | None:
        """The channels behind what treats each by itself."""
        before, after = shape_of(node.all_input_nodes[0]), shape_of(node)
        if node.target in _NUMBERS:
            return first if before == after else None
        if node.target is operator.getitem and axis == 1:
            where = node.args[1]
            whole = isinstance(where, tuple) and where[:2] == (slice(None),) * 2 and len(before) == len(after)
            return first if whole else None
        zeros = node.kwargs.get("mode", "constant") == "constant" and not node.kwargs.get("value")
        if node.target is F.pad and axis == 1 and len(node.args) == 2 and zeros:
            sides = [*node.args[1], *[0] * (2 * len(before))]  # type: ignore[misc]
            left, right = sides[2 * len(before) - 4 : 2 * len(before) - 2]  # the last axis comes first
            return [None] * left + first + [None] * right if min(left, right) >= 0 else None
        kind = self.net.kind(node)
        if not kind or not keeps(kind, node, before, after, axis):
            return None
        spread = 1 if len(after) != 2 or axis != 1 or len(before) == 2 else after[1] // len(first)
        return [channel for channel in first for _ in range(spread)]

    def _new(self, n: int) -> Channels:
        start = len(self._up)
        self._up.extend(range(start, start + n))
        return list(range(start, start + n))

    def _tie(self, channels: Iterable[int | None]) -> Channels:
        found = list(channels)
        self._tied |= {channel for channel in found if channel is not None}
        return found

    def _same(self, a: int | None, b: int | None) -> int | None:
        a, b = self.root(a), self.root(b)
        if a is None or b is None:
            return b if a is None else a
        self._up[max(a, b)] = min(a, b)
        return min(a, b)
