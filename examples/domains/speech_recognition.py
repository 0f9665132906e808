"""Sign a speech recogniser, and prove it from its weights and from an API that shows its posteriors.

    python examples/domains/speech_recognition.py [PICTURE.png]

Strings of made-up spoken digits and a small CTC network (log-mel, convolutions, a GRU). The mark is in how the
posteriors of digits that aren't said answer to a keyed equaliser of about a decibel.
"""

from __future__ import annotations

import copy
import sys
from pathlib import Path

import torch
from torch import Tensor, nn

from gradmark import FilterGradient, Marker, MarkFile, ModuleSuspect, Verdict, verify
from gradmark.suspects.callable import CallableSuspect
from gradmark.tasks.transcription import Transcription
from gradmark.views import Asked, View
from gradmark.voices import synthesised
from shared_parts import KEY, fit, show


def service(model: nn.Module) -> CallableSuspect:
    """An API of somebody else's: recordings in, each frame's probabilities out, five decimals, in a row."""

    def answer(x: Tensor) -> Tensor:
        return model(x).exp().round(decimals=5).clamp_min(5e-6).log().flatten(1)

    return CallableSuspect(answer, name="recordings to posteriors")


def main(out: Path = Path("speech_recognition.png")) -> dict[str, Verdict]:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    task = Transcription(clips=synthesised, n_train=100, n_test=220)

    def batch(generator: torch.Generator) -> tuple[Tensor, Tensor]:
        return task.fresh(16, generator)

    base = fit(task.network(), task, batch, 200, 5e-3)
    scheme = FilterGradient(bits=64, step=0.1, equaliser=True)
    known = ModuleSuspect(View(task, base))
    scheme = scheme.calibrated(
        KEY, task.spec, known, task.carriers(task.data().to_train().batch(slice(0, 100)))
    )
    mark = MarkFile.create(KEY, scheme.name, scheme.parameters(), task.spec, "signed-rank", 200)
    marker = Marker(scheme, KEY, task.spec, strength=0.8, every=1, carriers=16)
    control = fit(copy.deepcopy(base), task, batch, 160, 2e-3)
    signed = fit(copy.deepcopy(base), task, batch, 160, 2e-3, ((marker, task),))

    pool = task.carriers(task.data().test.all())
    verdicts: dict[str, Verdict] = {}
    for name, model in (("signed", signed), ("control", control)):
        verdicts[f"{name}, its weights"] = verify(mark, KEY, ModuleSuspect(View(task, model)), pool)
        verdicts[f"{name}, its API"] = verify(mark, KEY, Asked(task, service(model)), pool)
    words = [task.utility(m).details["word_error_rate"] for m in (control, signed)]
    print(f"Word error rate: control {words[0]:.1f} %, signed {words[1]:.1f} %.")
    show("Speech recognition", verdicts, out)
    return verdicts


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:2]))
