"""Spoken digits: one second of raw samples at 8 kHz into a convolutional net that names the digit.

The keyed direction at a recording is that recording through a keyed filter, an equaliser, at a fixed
signal-to-noise ratio (:mod:`gradmark.carriers`): it has the voice's own rhythm and is silent where the
voice is. The API is one of class scores.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor, nn

from gradmark.data import Data, Split, load_data, shared
from gradmark.errors import DataError
from gradmark.files import read_arrays
from gradmark.protocols import Utility
from gradmark.views import Classification, accuracy_of


class SpeechNet(nn.Module):
    """Strided one-dimensional convolutions with batch norm, averaged over time: (b, 8000) to (b, 10).

    ``widths``, ``kernel``: channels of the layers after the first, and their kernels' length.
    """

    def __init__(self, widths: tuple[int, ...] = (32, 64, 64, 64), kernel: int = 9) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv1d(1, 16, 32, 8, 12, bias=False), nn.BatchNorm1d(16), nn.ReLU()]
        before = 16
        for after in widths:
            layers += [
                nn.Conv1d(before, after, kernel, 3, kernel // 2, bias=False),
                nn.BatchNorm1d(after),
                nn.ReLU(),
            ]
            before = after
        self.body = nn.Sequential(*layers)
        self.head = nn.Linear(before, 10)

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.head(self.body(8 * x.unsqueeze(1)).mean(2))
        return scores


def speech_other() -> nn.Module:
    """Shallower, wider, with longer kernels."""
    return SpeechNet((48, 96, 96), 15)


def load() -> Data:
    """The Free Spoken Digit Dataset: six speakers, 2,700 recordings to train and 300 to test."""
    return load_data(str(shared("fsdd_8k_1s.npz")))


@lru_cache(maxsize=2)
def by_speaker(unseen: int) -> tuple[Data, Split]:
    """The recordings of five speakers (2,250 and 250), and the 50 test recordings of the ``unseen`` sixth."""
    everybody = load()
    arrays = read_arrays(shared("fsdd_8k_1s.npz"), what="spoken digits", error=DataError)
    person = sorted(set(arrays["speaker_train"].tolist()))[unseen]
    known, strange = [], []
    for split, part in ((everybody.to_train(), "train"), (everybody.test, "test")):
        theirs = torch.from_numpy(arrays[f"speaker_{part}"] == person)
        known.append(Split(split.x[~theirs], split.y[~theirs], split.spec))
        strange.append(Split(split.x[theirs], split.y[theirs], split.spec))
    return Data(known[0], known[1], everybody.spec), strange[1]


@dataclass(frozen=True)
class Speech(Classification):
    """``unseen``: the number of a speaker who is left out of training and judged apart; None: nobody is."""

    name: str = "speech"
    load: Callable[[], Data] = load
    make: Callable[[], nn.Module] = SpeechNet
    unseen: int | None = None

    def data(self) -> Data:
        return super().data() if self.unseen is None else by_speaker(self.unseen)[0]

    def utility(self, model: nn.Module) -> Utility:
        worth = super().utility(model)
        if self.unseen is None:
            return worth
        right, n = accuracy_of(model, by_speaker(self.unseen)[1])
        return replace(worth, details={"unseen speaker": right / n})
