"""Keyed directions of text: linear maps of embeddings for who holds the weights, words for who may only ask.

Fixed patterns would ask about absolute positions. A map moves each token by what it is, wherever it
stands; an API that takes words alone is asked about two inputs that differ in one keyed word.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gradmark.errors import UsageError
from gradmark.keys import OwnerKey
from gradmark.protocols import ModelSpec

_RANK = 8  # of a keyed map of embeddings: bounds what a key has to be stretched to in wide models


@dataclass(frozen=True)
class MapDirections:
    """Keyed linear maps of every token's embedding, of rank r: ``left`` (groups, K, E, r), ``right``
    (groups, K, r, E). Inputs are (b, T, E).

    Each token moves by ``step`` times its own embedding's length; all-zero rows are padding and stay.
    """

    left: Tensor
    right: Tensor
    step: float

    @property
    def groups(self) -> int:
        return self.left.shape[0]

    @property
    def n(self) -> int:
        return self.left.shape[1]

    def one(self, x: Tensor, group: Tensor, index: Tensor) -> Tensor:
        left, right = (m.to(x.device, x.dtype)[group, index] for m in (self.left, self.right))
        return self._sized(torch.einsum("ber,brf,btf->bte", left, right, x), x)

    def all(self, x: Tensor, group: Tensor) -> Tensor:
        left, right = (m.to(x.device, x.dtype)[group] for m in (self.left, self.right))
        return self._sized(torch.einsum("bker,bktr->bkte", left, torch.einsum("bkrf,btf->bktr", right, x)), x)

    def _sized(self, y: Tensor, x: Tensor) -> Tensor:
        long = y.norm(dim=-1, keepdim=True)
        wanted = self.step * x.norm(dim=-1, keepdim=True)
        if y.ndim > x.ndim:
            wanted = wanted[:, None]
        return torch.where(long > 0, y / long.clamp_min(1e-30) * wanted, torch.zeros_like(y))


@dataclass(frozen=True)
class WordDirections:
    """Keyed pairs of tokens (groups, K, 2): inputs (b, T) differ in which of the two stands at one place.

    The place depends on the input alone: the sum of its token numbers, modulo their count. There is no
    nudge and no derivative here; ``one`` and ``all`` are half the difference of the two inputs.
    """

    pairs: Tensor
    padding: int

    @property
    def groups(self) -> int:
        return self.pairs.shape[0]

    @property
    def n(self) -> int:
        return self.pairs.shape[1]

    def both(self, x: Tensor, group: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
        """Inputs (b, T) with the first and with the second token of each one's pair ``index`` (b,)."""
        real = x < self.padding
        place = (torch.where(real, x, 0).sum(1).long() % real.sum(1).clamp_min(1))[:, None]
        first, second = self.pairs.to(x.device, x.dtype)[group, index].split(1, 1)
        return x.scatter(1, place, first), x.scatter(1, place, second)

    def one(self, x: Tensor, group: Tensor, index: Tensor) -> Tensor:
        first, second = self.both(x, group, index)
        return (first - second) / 2

    def all(self, x: Tensor, group: Tensor) -> Tensor:
        numbers = torch.arange(self.n, device=x.device)
        return torch.stack([self.one(x, group, i.expand(len(x))) for i in numbers], 1)


def room_for_words(spec: ModelSpec) -> int:
    """How many directions a model of text offers: maps of embeddings ("text"), pairs of words ("tokens")."""
    if spec.domain == "text":
        return spec.input_shape[-1] * min(_RANK, spec.input_shape[-1])
    return (spec.levels or 0) // 2


def keyed_maps(
    key: OwnerKey, spec: ModelSpec, n: int, groups: int, step: float, context: bytes
) -> MapDirections:
    """Raises UsageError where the inputs aren't (T, E) or E is too small for ``n`` maps."""
    if len(spec.input_shape) != 2 or n > room_for_words(spec):
        raise UsageError(
            "The embeddings are too few or too narrow for that many bits",
            expected=f"inputs (tokens, features), and at most {room_for_words(spec)} directions",
            found=f"{n} directions for inputs {spec.input_shape}",
            fix="ask for fewer bits",
        )
    width = spec.input_shape[-1]
    shape = (groups, n, width, min(_RANK, width))
    left = torch.from_numpy(key.normals("directions", shape, context=context))
    right = torch.from_numpy(key.normals("maps", shape, context=context))
    return MapDirections(left.float(), right.transpose(-1, -2).float(), step)


def keyed_words(key: OwnerKey, spec: ModelSpec, n: int, groups: int, context: bytes) -> WordDirections:
    """Raises UsageError where the vocabulary has too few tokens for ``n`` pairs."""
    room = room_for_words(spec)
    if n > room:
        raise UsageError(
            "The vocabulary is too small for that many bits",
            expected=f"at most {room} pairs of tokens",
            found=str(n),
            fix="ask for fewer bits",
        )
    rows = []
    for group in range(groups):
        order = key.permutation(f"words {group}", 2 * room, context=context)[: 2 * n]
        rows.append(torch.from_numpy(order).reshape(n, 2))
    return WordDirections(torch.stack(rows), int(spec.levels or 0))
