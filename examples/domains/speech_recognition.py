"""Sign a speech recogniser, and prove it from a service that returns transcripts and how sure it is.

    python examples/domains/speech_recognition.py [--out DIR] [--small]

Strings of made-up spoken digits, a small CTC network (log-mel, convolutions, a GRU), and two marks under one
key: one in the posteriors, for who holds the weights, and one in the confidence, for who may only ask.
"""

from __future__ import annotations

import argparse
import copy
import math
from pathlib import Path

import torch
from torch import Tensor, nn

from gradmark import Marker, MarkFile, ModuleSuspect, OwnerKey, catalog, verify
from gradmark.suspects.callable import CallableSuspect
from gradmark.tasks.transcription import Transcription, confidence
from gradmark.views import Asked, View
from gradmark.voices import synthesised
from shared_parts import fit, show


def service(model: nn.Module) -> CallableSuspect:
    """An API of somebody else's: recordings in, for each transcript its confidence, four decimals."""

    def answer(x: Tensor) -> Tensor:
        return confidence(model(x)).round(decimals=4)[:, None]

    return CallableSuspect(answer, name="transcripts with a confidence")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("examples-out"))
    parser.add_argument("--small", action="store_true", help="fewer steps: a test of the script")
    given = parser.parse_args()
    steps, tuning = (150, 60) if given.small else (300, 120)
    torch.manual_seed(0)
    key = OwnerKey.generate("Acme Ltd")
    frames, sure = (Transcription(v, synthesised, n_train=300, n_test=600) for v in ("frames", "confidence"))  # type: ignore[arg-type]

    def batch(generator: torch.Generator) -> tuple[Tensor, Tensor]:
        return frames.fresh(16, generator)

    base = fit(frames.network(), frames, batch, steps, 5e-3)
    marks, markers = {}, []
    for view, bits in ((frames, 64), (sure, 24)):
        scheme = catalog.scheme("filter-gradient", {"bits": bits, "step": 0.05})
        known = ModuleSuspect(View(view, base))
        scheme = scheme.calibrated(key, view.spec, known, view.carriers(view.data().to_train().all()))  # type: ignore[attr-defined]
        marks[view.reads] = MarkFile.create(
            key, scheme.name, scheme.parameters(), view.spec, "signed-rank", 200
        )
        markers.append((Marker(scheme, key, view.spec, strength=0.2, every=2, carriers=16), view))
    control = fit(copy.deepcopy(base), frames, batch, tuning, 2e-3)
    signed = fit(copy.deepcopy(base), frames, batch, tuning, 2e-3, tuple(markers))

    pools = {v.reads: v.carriers(v.data().test.all()) for v in (frames, sure)}
    verdicts = {}
    for name, model in (("signed", signed), ("control", control)):
        white = ModuleSuspect(View(frames, model))
        verdicts[f"{name}, its weights"] = verify(marks["frames"], key, white, pools["frames"])
        asked = Asked(sure, service(model))
        verdicts[f"{name}, its API"] = verify(marks["confidence"], key, asked, pools["confidence"])
    words = [frames.utility(m).details["word_error_rate"] for m in (control, signed)]
    print(f"Word error rate: control {words[0]:.1f} %, signed {words[1]:.1f} %.")
    print(f"What is added to a recording is {-20 * math.log10(0.05):.0f} dB below it.")
    show("Speech recognition", verdicts, given.out / "speech_recognition.png")


if __name__ == "__main__":
    main()
