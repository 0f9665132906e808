"""Sign a speech recogniser, and prove it from a service that returns transcripts and how sure it is.

    python examples/domains/speech_recognition.py [PICTURE.png]

Strings of made-up spoken digits, a small CTC network (log-mel, convolutions, a GRU), and two marks under one
key: one in the posteriors, for who holds the weights, and one in the confidence, for who may only ask.
"""

from __future__ import annotations

import copy
import sys
from pathlib import Path

import torch
from torch import Tensor, nn

from gradmark import Marker, MarkFile, ModuleSuspect, Verdict, catalog, verify
from gradmark.suspects.callable import CallableSuspect
from gradmark.tasks.transcription import Transcription, confidence
from gradmark.views import Asked, View
from gradmark.voices import synthesised
from shared_parts import KEY, fit, show


def service(model: nn.Module) -> CallableSuspect:
    """An API of somebody else's: recordings in, for each transcript its confidence, four decimals."""

    def answer(x: Tensor) -> Tensor:
        return confidence(model(x)).round(decimals=4)[:, None]

    return CallableSuspect(answer, name="transcripts with a confidence")


def main(out: Path = Path("speech_recognition.png"), *, small: bool = False) -> dict[str, Verdict]:
    """``small``: fewer steps, to test the script."""
    torch.set_num_threads(1)
    steps, tuning = (150, 60) if small else (300, 120)
    torch.manual_seed(0)
    key = KEY
    frames, sure = (Transcription(v, synthesised, n_train=300, n_test=600) for v in ("frames", "confidence"))  # type: ignore[arg-type]

    def batch(generator: torch.Generator) -> tuple[Tensor, Tensor]:
        return frames.fresh(16, generator)

    base = fit(frames.network(), frames, batch, steps, 5e-3)
    marks, markers = {}, []
    for view, bits in ((frames, 64), (sure, 24)):
        scheme = catalog.scheme("filter-gradient", {"bits": bits, "step": 0.1, "equaliser": True})
        known = ModuleSuspect(View(view, base))
        scheme = scheme.calibrated(key, view.spec, known, view.carriers(view.data().to_train().all()))  # type: ignore[attr-defined]
        marks[view.reads] = MarkFile.create(
            key, scheme.name, scheme.parameters(), view.spec, "signed-rank", 200
        )
        markers.append((Marker(scheme, key, view.spec, strength=0.2, every=2, carriers=16), view))
    control = fit(copy.deepcopy(base), frames, batch, tuning, 2e-3)
    signed = fit(copy.deepcopy(base), frames, batch, tuning, 2e-3, tuple(markers))

    pools = {v.reads: v.carriers(v.data().test.all()) for v in (frames, sure)}
    verdicts: dict[str, Verdict] = {}
    for name, model in (("signed", signed), ("control", control)):
        white = ModuleSuspect(View(frames, model))
        verdicts[f"{name}, its weights"] = verify(marks["frames"], key, white, pools["frames"])
        asked = Asked(sure, service(model))
        verdicts[f"{name}, its API"] = verify(marks["confidence"], key, asked, pools["confidence"])
    words = [frames.utility(m).details["word_error_rate"] for m in (control, signed)]
    print(f"Word error rate: control {words[0]:.1f} %, signed {words[1]:.1f} %.")
    show("Speech recognition", verdicts, out)
    return verdicts


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:2]))
