"""A sentence classifier: words in, two classes or more out.

With two classes no wrong ones are left to compare, so the bits are in how the log-odds *move*. On *words*,
what an API takes: keyed words put in place of one another (:mod:`gradmark.token_directions`).
On *embeddings* (:class:`EmbeddedSentences`), for who holds the weights: keyed linear maps.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradmark.data import Data, Split, shared
from gradmark.errors import UsageError
from gradmark.protocols import Batch, Utility
from gradmark.suspects.checks import unwrap
from gradmark.text import Vocabulary, embedded, written_with
from gradmark.views import accuracy_of

LENGTH = 40


class SentenceNet(nn.Module):
    """BERT of transformers, built from a configuration, averaged over the words, and a linear layer.

    Word numbers (b, T), or embeddings (b, T, E), to logits (b, C). ``vocabulary``: V; the number V, or a
    row of zeros, is padding. Eager attention, since the fused kernels have no double backward.
    """

    def __init__(
        self, vocabulary: int, classes: int = 2, length: int = LENGTH, width: int = 64, layers: int = 1
    ) -> None:
        super().__init__()
        try:
            from transformers import BertConfig, BertModel
        except ImportError as cause:
            raise UsageError(
                "Sentence classifiers need transformers", fix="pip install 'gradmark[text]'"
            ) from cause
        config: Any = BertConfig(  # type: ignore[call-arg,unused-ignore]
            vocab_size=vocabulary + 1, pad_token_id=vocabulary, max_position_embeddings=length,
            hidden_size=width, intermediate_size=2 * width, num_hidden_layers=layers, num_attention_heads=4,
            hidden_dropout_prob=0.2, attn_implementation="eager",
        )  # fmt: skip
        self.bert: Any = BertModel(config, add_pooling_layer=False)
        self.head = nn.Linear(width, classes)
        self.vocabulary = vocabulary

    def table(self) -> Tensor:
        """A copy of the input embeddings (V, E)."""
        found: Tensor = self.bert.get_input_embeddings().weight[: self.vocabulary]
        return found.detach().clone()

    def forward(self, x: Tensor) -> Tensor:
        real = (x != 0).any(-1) if x.ndim == 3 else x < self.vocabulary
        given = {"inputs_embeds": x} if x.ndim == 3 else {"input_ids": x.long()}
        hidden = self.bert(**given, attention_mask=real.long()).last_hidden_state
        weight = real.to(hidden)[..., None]
        found: Tensor = self.head((hidden * weight).sum(1) / weight.sum(1).clamp_min(1))
        return found


@lru_cache(maxsize=2)
def reviews() -> tuple[Vocabulary, Data]:
    """Sentences of film reviews (rt-polarity), shuffled by a fixed seed: 80 % to train, the rest to test."""
    lines = shared("rt_polarity.jsonl").read_text().split("\n")
    rows = [json.loads(line) for line in lines if line]
    return sentence_data([row["text"] for row in rows], [int(row["label"]) for row in rows])


def sentence_data(
    texts: list[str], labels: list[int], length: int = LENGTH, share: float = 0.8
) -> tuple[Vocabulary, Data]:
    """Words between spaces that the training part has twice at least; any number of classes."""
    order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(0)).tolist()
    rows, y = [texts[i].split() for i in order], torch.tensor([labels[i] for i in order])
    cut = int(share * len(rows))
    vocabulary = Vocabulary.of((w for row in rows[:cut] for w in row), at_least=2, unknown="[unknown]")
    spec = vocabulary.spec(length, int(y.max()) + 1)
    x = vocabulary.padded(rows, length)
    return vocabulary, Data(Split(x[:cut], y[:cut], spec), Split(x[cut:], y[cut:], spec), spec)


@dataclass(frozen=True)
class Sentences:
    """``load`` gives vocabulary and data: word numbers (n, T), and classes (n,)."""

    load: Callable[[], tuple[Vocabulary, Data]] = reviews
    width: int = 64

    name: ClassVar[str] = "sentences"

    def data(self) -> Data:
        return self.load()[1]

    def network(self) -> nn.Module:
        vocabulary, data = self.load()
        return SentenceNet(len(vocabulary), data.spec.n_classes, data.spec.input_shape[0], self.width)

    def scores(self, model: Callable[[Tensor], Any], x: Tensor) -> Tensor:
        found: Tensor = unwrap(model(x))
        return found

    def carriers(self, batch: Batch) -> Batch:
        return batch

    def loss(self, model: nn.Module, batch: Batch, smoothing: float = 0.0) -> Tensor:
        return F.cross_entropy(unwrap(model(batch[0])), batch[1], label_smoothing=smoothing)

    def utility(self, model: nn.Module) -> Utility:
        """Accuracy in percent."""
        right, n = accuracy_of(model, self.data().test)
        return Utility(100 * right / n, n)

    def embedded(self, model: SentenceNet) -> EmbeddedSentences:
        """The view for who holds the weights. ``model``: the owner's, before the mark is put in."""
        return EmbeddedSentences(self.load, self.width, model.table())


@dataclass(frozen=True, eq=False)
class EmbeddedSentences(Sentences):
    """``table`` (V, E): the embeddings with which inputs are written, the same for every suspect."""

    table: Tensor = field(default_factory=lambda: torch.zeros(1, 1), repr=False)

    name: ClassVar[str] = "sentences-embedded"

    def data(self) -> Data:
        return written_with(self.table, self.load()[1])

    def carriers(self, batch: Batch) -> Batch:
        x, y = batch
        return embedded(self.table.to(x), x), y
