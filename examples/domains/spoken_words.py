"""Sign a recogniser of spoken words, raw samples in, and prove it through an API of class scores.

    python examples/domains/spoken_words.py [PICTURE.png]

The words are made here: three vowels each, by their formants, in voices of any pitch.
"""

from __future__ import annotations

import sys
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gradmark import FilterGradient, Verdict
from gradmark.data import Data, Split
from gradmark.embed import Recipe
from gradmark.protocols import ModelSpec
from gradmark.tasks.speech import SpeechNet
from gradmark.views import Classification
from shared_parts import proved

RATE, LENGTH, WORDS = 8000, 3200, 10
VOWELS = np.array(
    [(730, 1090), (270, 2290), (300, 870), (530, 1840), (570, 840), (440, 1020)]
)  # Hz, F1 and F2
SPEC = ModelSpec("signal", (LENGTH,), WORDS, -1.0, 32767 / 32768, 65535)


def spoken(n: int, seed: int) -> Split:
    """Words (n, 3200) int16 of random voices, speeds and loudness, with a little noise."""
    draw = np.random.default_rng(seed)
    labels = np.arange(n) % WORDS
    clips = np.empty((n, LENGTH), np.int16)
    time = np.arange(LENGTH) / RATE
    for i, word in enumerate(labels):
        targets = VOWELS[[word % 6, (word * 2 + 3) % 6, (word // 2 + 1) % 6]] * draw.uniform(0.92, 1.1)
        start, length = draw.uniform(0.02, 0.08), draw.uniform(0.22, 0.3)
        place = np.clip((time - start) / length, 0, 1) * 2
        formants = [np.interp(place, (0, 1, 2), targets[:, k]) for k in range(2)]
        pitch = draw.uniform(90, 220) * (1 - 0.15 * place)
        phase = 2 * np.pi * np.cumsum(pitch) / RATE
        sound = np.zeros(LENGTH)
        for harmonic in range(1, 1 + int(3400 / pitch.max())):
            envelope = sum(1 / (1 + ((harmonic * pitch - f) / 90) ** 2) for f in formants)
            sound += envelope * np.sin(harmonic * phase)
        sound *= np.clip(20 * (time - start), 0, 1) * np.clip(20 * (start + length - time), 0, 1)
        sound = draw.uniform(0.1, 0.3) * sound / np.abs(sound).max() + 0.003 * draw.standard_normal(LENGTH)
        clips[i] = (32767 * sound).astype(np.int16)
    return Split(torch.from_numpy(clips), torch.from_numpy(labels.astype(np.int64)), SPEC)


@lru_cache(maxsize=1)
def words() -> Data:
    return Data(spoken(800, 1), spoken(200, 2), SPEC)


def draw(axes: Any, clip: Tensor, nudged: Tensor) -> None:
    seconds = np.arange(LENGTH) / RATE
    db = 10 * float((clip.square().mean() / (nudged - clip).square().mean()).log10())
    axes.plot(seconds, clip, color="0.6", linewidth=0.5, label="a word")
    axes.plot(
        seconds, nudged - clip, color="C0", linewidth=0.5, label=f"what the key adds, {db:.0f} dB below"
    )
    loudest = float(clip.abs().max())
    axes.set(xlabel="seconds", title="What the API is asked", ylim=(-1.1 * loudest, 1.6 * loudest))
    axes.legend(frameon=False, loc="upper right")


def main(out: Path = Path("spoken_words.png")) -> dict[str, Verdict]:
    task = Classification("words", words, lambda: SpeechNet(widths=(32, 48, 48)))
    apis = {"API of class scores": (task, lambda net: nn.Sequential(net, nn.Softmax(1)))}
    recipe = Recipe(epochs=10, batch_size=50, lr=5e-3)
    scheme = FilterGradient(bits=64, step=0.1)
    return proved(task, scheme, recipe, out, draw, apis, carriers=25, every=1)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:2]))
