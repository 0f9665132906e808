"""Spoken digits: one second of raw samples at 8 kHz into a convolutional net that names the digit.

The keyed direction at a recording is that recording through a keyed filter, an equaliser, at a fixed
signal-to-noise ratio (:mod:`gradmark.carriers`): it has the voice's own rhythm and is silent where the
voice is. The API is one of class scores.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

from gradmark.data import Data, load_data, shared
from gradmark.views import Classification


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


@dataclass(frozen=True)
class Speech(Classification):
    """Spoken digits of the speakers that the network was trained on."""

    name: str = "speech"
    load: Callable[[], Data] = load
    make: Callable[[], nn.Module] = SpeechNet
