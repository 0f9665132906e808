"""Recordings of single digits, real or made, and strings of them with pauses and noise."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from gradmark.data import shared

RATE = 8000
_PAUSE = (0.03, 0.15)  # seconds
_DIGITS = (2, 3)  # in a string
_NOISE = (0.001, 0.01)  # root mean square, of full scale
_QUIET = 0.02  # of a recording's peak: what comes before and after it is silence


@dataclass(frozen=True)
class Clips:
    """``sounds``: recordings (samples,) in [-1, 1], without silence around; ``digits``: what they say."""

    sounds: tuple[Tensor, ...]
    digits: tuple[int, ...]


@lru_cache(maxsize=1)
def recorded(stranger: str = "theo") -> tuple[Clips, Clips, Clips]:
    """The Free Spoken Digit Dataset: five speakers to train and to test, and one whom no training hears."""
    with np.load(shared("fsdd_8k_1s.npz")) as file:
        parts = {n: {k: file[f"{k}_{n}"] for k in ("x", "y", "speaker", "len")} for n in ("train", "test")}

    def clips(of: str, strange: bool) -> Clips:
        part = parts[of]
        chosen = np.flatnonzero((part["speaker"] == stranger) == strange)
        sounds = tuple(_trimmed(part["x"][i, : part["len"][i]]) for i in chosen)
        return Clips(sounds, tuple(int(part["y"][i]) for i in chosen))

    return clips("train", False), clips("test", False), clips("test", True)


def _trimmed(samples: np.ndarray[tuple[int], np.dtype[np.int16]]) -> Tensor:
    x = torch.from_numpy(samples.astype(np.float32) / 32768)
    loud = (x.abs() > _QUIET * x.abs().max()).nonzero()
    return x[int(loud[0]) : int(loud[-1]) + 1][:RATE] if len(loud) else x


def joined(clips: Clips, n: int, length: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """``n`` strings of two or three digits of random clips: samples (n, length) int16, and the digits (n, 3),
    padded by -1. A clip that would not fit any more is left out."""
    x = torch.zeros(n, length)
    y = torch.full((n, _DIGITS[1]), -1, dtype=torch.long)
    uniform = torch.rand(n, 2 + 2 * _DIGITS[1], generator=generator)
    for i in range(n):
        wanted = _DIGITS[0] + int(uniform[i, 0] * (_DIGITS[1] - _DIGITS[0] + 1))
        place, said = 0, 0
        for k in range(wanted):
            place += int(RATE * (_PAUSE[0] + (_PAUSE[1] - _PAUSE[0]) * float(uniform[i, 2 + 2 * k])))
            chosen = int(uniform[i, 3 + 2 * k] * len(clips.sounds))
            sound = clips.sounds[chosen]
            if place + len(sound) > length:
                break
            x[i, place : place + len(sound)] = 0.5 * sound / sound.abs().max().clamp_min(1e-3)
            y[i, said], said, place = clips.digits[chosen], said + 1, place + len(sound)
    loud = _NOISE[0] * (_NOISE[1] / _NOISE[0]) ** uniform[:, 1:2]
    x += loud * torch.randn(n, length, generator=generator)
    return (32767 * x.clamp(-1, 1)).round().to(torch.int16), y


# Two formants in hertz of each sound, and its share of noise: enough to tell ten words apart.
_SOUNDS = {
    "a": (750, 1250, 0.0), "e": (480, 1900, 0.0), "i": (300, 2300, 0.0), "o": (480, 900, 0.0),
    "u": (320, 800, 0.0), "s": (2800, 3600, 1.0), "f": (1500, 3000, 1.0), "n": (280, 1400, 0.1),
}  # fmt: skip
_WORDS = ("ino", "uan", "tuu", "fie", "foo", "fai", "sis", "sen", "eei", "nan")


@lru_cache(maxsize=1)
def synthesised(per_digit: int = 12) -> tuple[Clips, Clips, Clips]:
    """Made voices where there are no recordings: eight to train, the same to test, another one unheard.

    Each word is a row of sounds, each sound the harmonics of a voice's pitch under two formants, or noise.
    """
    generator = torch.Generator().manual_seed(0)
    voices = [(90 + 18 * i, 0.88 + 0.03 * i) for i in range(9)]
    parts: list[Clips] = []
    for chosen, repeats in ((voices[:8], per_digit), (voices[:8], 3), (voices[8:], 12)):
        sounds, digits = [], []
        for digit, word in enumerate(_WORDS):
            for pitch, size in chosen:
                for _ in range(max(1, repeats // 4)):
                    sounds.append(torch.cat([_sound(s, pitch, size, generator) for s in word]))
                    digits.append(digit)
        parts.append(Clips(tuple(sounds), tuple(digits)))
    return parts[0], parts[1], parts[2]


def _sound(name: str, pitch: float, size: float, generator: torch.Generator) -> Tensor:
    """One sound (samples,) of a voice of ``pitch`` in hertz whose formants are ``size`` times the usual."""
    low, high, breath = _SOUNDS.get(name, (1200, 2400, 0.8))
    wobble = torch.rand(3, generator=generator)
    n = int(RATE * (0.08 + 0.06 * float(wobble[0])))
    t = torch.arange(n) / RATE
    tone = pitch * (0.9 + 0.2 * float(wobble[1]))
    f = tone * torch.arange(1, int(RATE / 2 / tone))
    formants = torch.tensor([low, high]) * size * (0.95 + 0.1 * float(wobble[2]))
    loud = torch.exp(-(((f[:, None] - formants) / 220) ** 2)).sum(1)
    voice = (loud[:, None] * torch.sin(2 * torch.pi * f[:, None] * t)).sum(0)
    noise = torch.randn(n, generator=generator) * torch.sin(2 * torch.pi * float(formants[1]) * t)
    envelope = torch.sin(torch.pi * (torch.arange(n) + 0.5) / n).sqrt()
    mixed = (1 - breath) * voice / voice.abs().max().clamp_min(1e-3) + 0.4 * breath * noise
    return 0.5 * envelope * mixed
