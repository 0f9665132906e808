"""Words and characters as numbers: vocabularies, windows of text, and contexts that share their beginning.

Token numbers travel as floats, which hold them exactly, so that they go where all inputs go (endpoints,
journals, mark files). The number after the last word, ``ModelSpec.levels``, is padding.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gradmark.data import Data
from gradmark.protocols import ModelSpec


@dataclass(frozen=True)
class Vocabulary:
    """``words``: tokens by number, the most frequent first. What isn't among them reads as ``unknown``."""

    words: tuple[str, ...]
    unknown: int = 0

    @classmethod
    def of(cls, tokens: Iterable[str], *, at_least: int = 1, unknown: str = "") -> Vocabulary:
        """The tokens that occur ``at_least`` so often; ties in alphabetical order."""
        found = [(-n, word) for word, n in Counter(tokens).items() if n >= at_least and word != unknown]
        return cls((*((unknown,) if unknown else ()), *(word for _, word in sorted(found))))

    def __len__(self) -> int:
        return len(self.words)

    def numbers(self, tokens: Sequence[str]) -> Tensor:
        """(n,) float32."""
        index = {word: i for i, word in enumerate(self.words)}
        return torch.tensor([index.get(token, self.unknown) for token in tokens], dtype=torch.float32)

    def padded(self, rows: Sequence[Sequence[str]], length: int) -> Tensor:
        """(n, length) float32: rows cut to ``length``, or filled with padding."""
        x = torch.full((len(rows), length), float(len(self)))
        index = {word: i for i, word in enumerate(self.words)}
        for row, tokens in zip(x, rows, strict=True):
            known = [float(index.get(token, self.unknown)) for token in tokens[:length]]
            row[: len(known)] = torch.tensor(known)
        return x

    def tokens(self, numbers: Tensor) -> list[str]:
        """The words of a row (n,), without padding."""
        return [self.words[int(i)] for i in numbers.tolist() if i < len(self)]

    def spec(self, length: int, n_classes: int) -> ModelSpec:
        """What a mark must know of a model that takes rows of ``length`` tokens."""
        return ModelSpec("tokens", (length,), n_classes, 0.0, float(len(self)), len(self))


def windows(numbers: Tensor, length: int, stride: int) -> tuple[Tensor, Tensor]:
    """Windows (n, length) of a long row, and for each token in them the next one (n, length) int64."""
    cut = numbers.unfold(0, length + 1, stride)
    return cut[:, :-1].contiguous(), cut[:, 1:].long().contiguous()


def prefixes(x: Tensor, padding: int) -> Tensor:
    """Every beginning of every window: (n, T) to (n T, T), each filled with padding."""
    n, t = x.shape
    shown = torch.ones(t, t, dtype=torch.bool).tril()
    return torch.where(shown, x[:, None, :], float(padding)).reshape(n * t, t)


def longest(x: Tensor, padding: int) -> tuple[Tensor, Tensor]:
    """Rows (m,) of ``x`` (n, T) that don't begin the row after them, and for each row which of those
    begins with it (n,): a causal network answers for all beginnings of a row at once."""
    begins = ((x[:-1] == x[1:]) | (x[:-1] == padding)).all(1)
    own = torch.cat([~begins, torch.ones(1, dtype=torch.bool, device=x.device)])
    heads = own.nonzero()[:, 0]
    return heads, torch.searchsorted(heads, torch.arange(len(x), device=x.device))


def embedded(table: Tensor, x: Tensor) -> Tensor:
    """(n, T, E): rows of ``table`` (V, E) for numbers (n, T); zeros for padding."""
    known = (x < len(table))[..., None]
    return table[x.long().clamp_max(len(table) - 1)] * known


def written_with(table: Tensor, plain: Data) -> Data:
    """The data of token numbers, described as a network takes it that is given rows of ``table`` (V, E)."""
    spec = ModelSpec("text", (*plain.spec.input_shape, table.shape[1]), plain.spec.n_classes)
    return Data(plain.train, plain.test, spec)
