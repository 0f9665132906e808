"""Spoken digits (Free Spoken Digit Dataset): one second at 8 kHz, raw samples into a convolutional net."""

from __future__ import annotations

import torch
from torch import Tensor

from gradmark.bench.experiment import Experiment, Marking, Means
from gradmark.data import Data
from gradmark.embed import Recipe
from gradmark.tasks.speech import Speech, speech_other

MARKER = {"target_log10_p": -18.0, "budget": 0.5, "carriers": 32, "every": 2}
SIGNED = {"budget": 0.5, "carriers": 32, "every": 2, "new_heads": True}


def babble(data: Data, n: int, generator: torch.Generator) -> Tensor:
    """Three recordings (n, 8000) at once, each reversed, at another speed and shifted: sound, no digit."""
    train, (length,) = data.to_train(), data.spec.input_shape
    total = torch.zeros(n, length)
    for _ in range(3):
        x = train.batch(torch.randint(len(train), (n,), generator=generator))[0].flip(1)
        speed = 0.7 + 0.6 * torch.rand(n, 1, generator=generator)
        shift = torch.randint(length, (n, 1), generator=generator)
        place = ((torch.arange(length) * speed).long() + shift) % length
        total += x.gather(1, place)
    return data.spec.snap(total / 2)


def experiment(name: str = "speech", unseen: int | None = None, epochs: int = 25) -> Experiment:
    """From scratch on 2,700 recordings; 300 of the same six speakers to test."""
    return Experiment(
        task=Speech(name, unseen=unseen),
        other=speech_other,
        recipe=Recipe(epochs=epochs, lr=5e-3),
        surrogate=babble,
        marking=Marking({}, MARKER),
        markings={
            # a share of each recording's loudness; a hundredth cost 4 points for less than half the evidence
            "filter-gradient": Marking({"bits": 64, "step": 0.1}, MARKER),
            "ensemble": Marking({"bits": 64, "step": 0.1}, SIGNED, {"smoothing": 0.1}),
        },
        means=Means(lr=0.02),
    )


def longer() -> Experiment:
    """Network, control and siblings trained for twice as long."""
    return experiment("speech-long", epochs=50)


def without1() -> Experiment:
    """One speaker of six is never heard in training; fewer epochs."""
    return experiment("speech-1", 1, 6)


def without2() -> Experiment:
    return experiment("speech-2", 2, 6)


def without3() -> Experiment:
    return experiment("speech-3", 3, 6)
