"""Transcription: strings of spoken digits at 8 kHz into a network trained with connectionist temporal
classification (CTC, Graves et al. 2006).

CTC's loss has no double backward, and as a score it would say how well the *right* transcript fits. The
mark rides on the posteriors instead, of which there are these views:

- ``frames``: an API that shows its posteriors. The score of a digit is its log-probability among the
  digits, averaged over the frames where something is said that isn't this digit.
- ``confidence``: an API that shows a transcript and how sure it is; the same mark serves. The score of a
  digit is its share of the transcript times the log-odds of the confidence c, the geometric mean of the
  best path's probability over the frames that say a digit: what favours it makes transcripts with it surer.
- ``said``: what ``confidence`` is trained through, since a best path jumps and this
  doesn't: a digit's log-odds at the frames that say it, weighted by how surely they do.
- ``posteriors``: what a thief learns from, each frame's answer on its own.

The direction at a recording is that recording through a keyed filter (:mod:`gradmark.carriers`). Features
are not normalised by recording: a cepstral mean would take every filter away, and so the mark.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradmark.data import Data, Split
from gradmark.errors import UsageError
from gradmark.protocols import Batch, ModelSpec, Utility
from gradmark.suspects.checks import unwrap
from gradmark.transcripts import edit_distance
from gradmark.views import judging
from gradmark.voices import RATE, Clips, joined, recorded

LENGTH = 14_000  # samples: 1.75 s
DIGITS, BLANK = 10, 10
_MELS, _HOP, _WINDOW, _FFT = 40, 80, 200, 256


def mel_filters(n_mels: int = _MELS, n_fft: int = _FFT, rate: int = RATE) -> Tensor:
    """(n_mels, n_fft / 2 + 1) triangular filters, evenly spaced on the mel scale from 50 Hz to rate / 2."""

    def mel(hertz: Tensor) -> Tensor:
        return 2595 * torch.log10(1 + hertz / 700)

    low, high = mel(torch.tensor([50.0, rate / 2]))
    corners = torch.linspace(float(low), float(high), n_mels + 2)
    bins = mel(torch.linspace(0, rate / 2, n_fft // 2 + 1))
    rise = (bins - corners[:-2, None]) / (corners[1:-1] - corners[:-2])[:, None]
    fall = (corners[2:, None] - bins) / (corners[2:] - corners[1:-1])[:, None]
    return torch.minimum(rise, fall).clamp_min(0)


class Transcriber(nn.Module):
    """Log-mel features, two strided convolutions and a bidirectional GRU: samples (b, n) in [-1, 1] to
    log-probabilities (b, frames, 11) of the ten digits and the blank, a frame every 40 ms."""

    window: Tensor
    filters: Tensor

    def __init__(self, width: int = 48) -> None:
        super().__init__()
        self.register_buffer("window", torch.hann_window(_WINDOW), persistent=False)
        self.register_buffer("filters", mel_filters(), persistent=False)
        self.conv = nn.Sequential(
            nn.Conv1d(_MELS, 64, 5, 2, 2), nn.BatchNorm1d(64), nn.ReLU(),
            nn.Conv1d(64, 64, 5, 2, 2), nn.BatchNorm1d(64), nn.ReLU(),
        )  # fmt: skip
        self.gru = nn.GRU(64, width, batch_first=True, bidirectional=True)
        self.head = nn.Linear(2 * width, DIGITS + 1)

    def forward(self, x: Tensor) -> Tensor:
        spectrum = torch.stft(
            x, _FFT, _HOP, _WINDOW, self.window.to(x.dtype), center=True, return_complex=True
        )
        power = spectrum.real.square() + spectrum.imag.square()
        features = (self.filters.to(x.dtype) @ power + 1e-4).log() / 4
        hidden, _ = self.gru(self.conv(features).transpose(1, 2))
        found: Tensor = self.head(hidden).log_softmax(-1)
        return found


def best_path(log_p: Tensor) -> list[list[int]]:
    """The transcripts of the likeliest frames (b, frames, 11): repeats merged, blanks left out."""
    rows = []
    for frames in log_p.argmax(-1).tolist():
        merged = [d for d, before in zip(frames, [BLANK, *frames[:-1]], strict=True) if d != before]
        rows.append([d for d in merged if d != BLANK])
    return rows


def confidence(log_p: Tensor) -> Tensor:
    """(b,) geometric mean of the best path's probability (b, frames, 11) over the frames that say a digit, as
    toolkits aggregate it without blanks; the number 1 where nothing is said."""
    best, digit = log_p.max(-1)
    said = digit != BLANK
    return ((best * said).sum(1) / said.sum(1).clamp_min(1)).exp()


def transcript_scores(c: Tensor, digits: Tensor) -> Tensor:
    """(b, 10) each digit's share of the transcript (b, n), padded by -1, times the log-odds of c (b,).

    Less 1, which contrasts don't see, so that unsure answers aren't taken for probabilities.
    """
    counts = F.one_hot(digits + 1, DIGITS + 1).sum(1)[:, 1:].to(c)
    shares = counts / counts.sum(1, keepdim=True).clamp_min(1)
    c = c.clamp(1e-6, 1 - 1e-6)
    return shares * (c / (1 - c)).log()[:, None] - 1


def padded(rows: list[list[int]]) -> Tensor:
    """Transcripts as (b, longest) int64, filled with -1."""
    n = max((len(row) for row in rows), default=0)
    return torch.tensor([row + [-1] * (n - len(row)) for row in rows], dtype=torch.long).reshape(len(rows), n)


def digit_scores(log_p: Tensor) -> Tensor:
    """(b, 10) mean over frames of each digit's log-probability among the digits: where something is said, and
    it isn't this digit. How digits compare that aren't said is free; one that is said is no part of it."""
    said = (1 - log_p[..., BLANK:].exp()).clamp_min(1e-4)
    among = log_p[..., :BLANK].log_softmax(-1)
    weight = said * (1 - among.exp()).clamp_min(1e-4)
    return (weight * among).sum(1) / weight.sum(1)


def said_scores(log_p: Tensor) -> Tensor:
    """(b, 10) ``sum_t p_td log(p_td / (1 - p_td)) / sum_td p_td``; p_td is digit d's probability at frame t.

    Less 1, as :func:`transcript_scores`, whose smooth relative this is.
    """
    digits = log_p[..., :BLANK]
    p = digits.exp()
    odds = digits - (-p).clamp_min(-1 + 1e-4).log1p()
    return (p * odds).sum(1) / p.sum((1, 2))[:, None].clamp_min(1e-3) - 1


SPEC = ModelSpec("signal", (LENGTH,), DIGITS, -1.0, 1.0, 65536)
Speakers = Callable[[], tuple[Clips, Clips, Clips]]


@lru_cache(maxsize=4)
def strings(clips: Speakers, n_train: int, n_test: int, unseen: bool) -> Data:
    """Fixed strings for reading and testing; :meth:`Transcription.fresh` makes others to train on."""
    known, test, strange = clips()
    train = joined(known, n_train, LENGTH, torch.Generator().manual_seed(1))
    tested = joined(strange if unseen else test, n_test, LENGTH, torch.Generator().manual_seed(2))
    return Data(Split(*train, SPEC), Split(*tested, SPEC), SPEC)


@dataclass(frozen=True)
class Transcription:
    """``reads``: the view. ``clips``: gives recordings of single digits of known speakers to train and to
    test on, and of a speaker whom no training hears; ``unseen``: the test strings are his."""

    reads: Literal["frames", "confidence", "said", "posteriors"] = "frames"
    clips: Speakers = recorded
    unseen: bool = False
    n_train: int = 500
    n_test: int = 4000

    name: ClassVar[str] = "transcription"

    def data(self) -> Data:
        return strings(self.clips, self.n_train, self.n_test, self.unseen)

    @property
    def spec(self) -> ModelSpec:
        """The same for all views: one mark serves them."""
        return SPEC

    def thiefs(self) -> Transcription:
        """As a thief looks at it who trains on answers: every frame's own."""
        return replace(self, reads="posteriors")

    def fresh(self, n: int, generator: torch.Generator) -> Batch:
        """``n`` new training strings, float32."""
        x, y = joined(self.clips()[0], n, LENGTH, generator)
        return x.float() / 32768, y

    def network(self) -> nn.Module:
        return Transcriber()

    def scores(self, model: Callable[[Tensor], Any], x: Tensor) -> Tensor:
        """From posteriors (b, frames, 11), or from an API's rows: the same, frame after frame
        (b, frames x 11), or a confidence and the transcript's digits, padded by -1 (b, 1 + n). A thief's
        scores are (b x frames, 11)."""
        out: Tensor = unwrap(model(x))
        if self.reads == "frames":
            return digit_scores(out.reshape(len(x), -1, DIGITS + 1))
        if self.reads == "posteriors":
            return out.reshape(-1, DIGITS + 1)
        if self.reads == "said":
            return said_scores(out)
        if out.ndim == 3:
            return transcript_scores(confidence(out), padded(best_path(out)).to(out.device))
        return transcript_scores(out[:, 0], out[:, 1:].long())

    def carriers(self, batch: Batch) -> Batch:
        """Every recording. Left alone by the contrasts is the first digit, where all compare; where only what
        was said shows, a digit that wasn't."""
        x, y = batch
        if self.reads == "frames":
            return x, y[:, 0]
        said = F.one_hot(y + 1, DIGITS + 1).sum(1)[:, 1:]
        return x, said.argmin(1)

    def loss(self, model: nn.Module, batch: Batch, smoothing: float = 0.0) -> Tensor:
        """CTC's negative log-likelihood per digit; targets (b, most) are padded by -1."""
        if smoothing:
            raise UsageError("Labels of a CTC network can't be smoothed", found=str(smoothing))
        x, y = batch
        log_p = unwrap(model(x)).transpose(0, 1)
        frames = torch.full((len(x),), log_p.shape[0], dtype=torch.long)
        return F.ctc_loss(log_p, y.clamp_min(0), frames, (y >= 0).sum(1), blank=BLANK, zero_infinity=True)

    def utility(self, model: nn.Module) -> Utility:
        """100 less the word error rate in percent, and the latter itself; a word is a digit."""
        data, wrong, n = self.data().test, 0, 0
        with judging(model):
            for s in range(0, len(data), 256):
                x, y = data.batch(slice(s, s + 256))
                for said, wanted in zip(best_path(unwrap(model(x))), y.tolist(), strict=True):
                    right = [d for d in wanted if d >= 0]
                    wrong, n = wrong + edit_distance(said, right), n + len(right)
        return Utility(100 * max(0.0, 1 - wrong / n), n, {"word_error_rate": 100 * wrong / n})
