"""A causal language model: contexts in, the log-probabilities of the next token out.

Two views. On *tokens*, what an API with log-probabilities shows: an input is a context, its class the
token it ends with, and the contrasts compare all other tokens as the next one. One query tells
all contrasts. On *embeddings* (:class:`EmbeddedLanguage`), for who holds the weights: the score is the mean
over positions, and the directions are keyed linear maps of the embeddings (:mod:`gradmark.token_directions`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradmark.data import Data, Split, shared
from gradmark.errors import UsageError
from gradmark.protocols import Batch, Utility
from gradmark.suspects.checks import unwrap
from gradmark.text import Vocabulary, embedded, longest, prefixes, windows, written_with
from gradmark.views import judging

LENGTH = 32


class CausalNet(nn.Module):
    """GPT-2 of transformers, built from a configuration. Token numbers (b, T), or embeddings (b, T, E), to
    logits (b, T, V). ``vocabulary``: V; the number V is padding, which a causal model never looks back on.

    Eager attention, since the fused kernels have no double backward (:mod:`gradmark.embed.preflight`).
    """

    def __init__(self, vocabulary: int, length: int = LENGTH, width: int = 64, layers: int = 2) -> None:
        super().__init__()
        try:
            from transformers import GPT2Config, GPT2LMHeadModel
        except ImportError as cause:
            raise UsageError(
                "Language models need transformers", fix="pip install 'gradmark[text]'"
            ) from cause
        config: Any = GPT2Config(  # type: ignore[call-arg,unused-ignore]
            vocab_size=vocabulary, n_positions=length, n_embd=width, n_layer=layers, n_head=4,
            resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=None, eos_token_id=None,
            use_cache=False, attn_implementation="eager", tie_word_embeddings=False,
        )  # fmt: skip
        self.gpt: Any = GPT2LMHeadModel(config)
        _plain(self.gpt)
        self.vocabulary = vocabulary

    def table(self) -> Tensor:
        """A copy of the input embeddings (V, E)."""
        found: Tensor = self.gpt.get_input_embeddings().weight
        return found.detach().clone()

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim == 3:
            found: Tensor = self.gpt(inputs_embeds=x).logits
        else:
            found = self.gpt(input_ids=torch.where(x < self.vocabulary, x, 0).long()).logits
        return found


def _plain(model: nn.Module) -> None:
    """GPT-2's own kind of linear layer, its weights the other way round, as ``nn.Linear``: what LoRA and
    quantisation know."""
    for parent in list(model.modules()):
        for name, layer in list(parent.named_children()):
            if type(layer).__name__ == "Conv1D":
                weight, bias = cast(Tensor, layer.weight), cast(Tensor, layer.bias)
                plain = nn.Linear(weight.shape[0], weight.shape[1])
                with torch.no_grad():
                    plain.weight.copy_(weight.T)
                    plain.bias.copy_(bias)
                setattr(parent, name, plain)


@lru_cache(maxsize=2)
def shakespeare() -> tuple[Vocabulary, Data]:
    """Characters of tinyshakespeare: the first 90 % to train, the rest to test, in windows of 32."""
    return text_data(shared("tinyshakespeare.txt").read_text())


def text_data(text: str, length: int = LENGTH, share: float = 0.9) -> tuple[Vocabulary, Data]:
    """Characters of ``text`` as windows: overlapping by half to train, apart to test."""
    vocabulary = Vocabulary.of(text)
    numbers, cut = vocabulary.numbers(text), int(share * len(text))
    spec = vocabulary.spec(length, len(vocabulary))
    train, test = windows(numbers[:cut], length, length // 2), windows(numbers[cut:], length, length)
    return vocabulary, Data(Split(*train, spec), Split(*test, spec), spec)


@dataclass(frozen=True)
class Language:
    """``load`` gives vocabulary and data: windows (n, T) of token numbers and the next tokens (n, T).
    ``everywhere``: scores behind every token of a window, not only its last."""

    load: Callable[[], tuple[Vocabulary, Data]] = shakespeare
    width: int = 48

    everywhere: bool = False

    name: ClassVar[str] = "language"

    def data(self) -> Data:
        return self.load()[1]

    def thiefs(self) -> Language:
        """As a thief looks at it who trains on answers: those of all positions."""
        return replace(self, everywhere=True)

    def network(self) -> nn.Module:
        spec = self.data().spec
        return CausalNet(spec.n_classes, spec.input_shape[0], self.width)

    def scores(self, model: Callable[[Tensor], Any], x: Tensor) -> Tensor:
        """Of a model (b, T, V) the logits behind each context's last token; an API answers so itself.
        ``everywhere``: behind every token, (b x T, V)."""
        padding = self.data().spec.n_classes
        found: Tensor
        if not isinstance(model, nn.Module):
            found = unwrap(model(x))
            return found
        if self.everywhere:
            found = unwrap(model(x)).flatten(0, 1)
            return found
        heads, own = longest(x, padding)
        last = (x < padding).sum(1) - 1
        whole: Tensor = unwrap(model(x[heads]))
        return whole[own, last]

    def carriers(self, batch: Batch) -> Batch:
        """All beginnings of the windows, each with its last token: the one that contrasts leave alone."""
        x = batch[0]
        return prefixes(x, self.data().spec.n_classes), x.flatten().long()

    def loss(self, model: nn.Module, batch: Batch, smoothing: float = 0.0) -> Tensor:
        """Cross-entropy of every next token."""
        scores = unwrap(model(batch[0]))
        return F.cross_entropy(scores.flatten(0, 1), batch[1].flatten(), label_smoothing=smoothing)

    def utility(self, model: nn.Module) -> Utility:
        """Next tokens guessed rightly, in percent, and the perplexity, a token."""
        data, right, loss = self.data().test, 0, 0.0
        with judging(model):
            for s in range(0, len(data), 256):
                x, y = data.batch(slice(s, s + 256))
                scores = unwrap(model(x)).flatten(0, 1)
                right += int((scores.argmax(1) == y.flatten()).sum())
                loss += float(F.cross_entropy(scores, y.flatten(), reduction="sum"))
        n = data.y.numel()
        return Utility(100 * right / n, n, {"perplexity": math.exp(loss / n)})

    def embedded(self, model: CausalNet) -> EmbeddedLanguage:
        """The view for who holds the weights. ``model``: the owner's, before the mark is put in."""
        return EmbeddedLanguage(self.load, self.width, table=model.table())


@dataclass(frozen=True, eq=False)
class EmbeddedLanguage(Language):
    """``table`` (V, E): the embeddings with which inputs are written, the same for every suspect."""

    table: Tensor = field(default_factory=lambda: torch.zeros(1, 1), repr=False)

    name: ClassVar[str] = "language-embedded"

    def data(self) -> Data:
        return written_with(self.table, self.load()[1])

    def scores(self, model: Callable[[Tensor], Any], x: Tensor) -> Tensor:
        """Mean over positions of the logits: contrasts of what comes next, anywhere in the text."""
        found: Tensor = unwrap(model(x)).mean(1)
        return found

    def carriers(self, batch: Batch) -> Batch:
        x = batch[0]
        return embedded(self.table.to(x), x), x[:, -1].long()
