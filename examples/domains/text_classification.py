"""Sign a classifier of sentences, and prove it from its weights and from an API that takes text.

    python examples/domains/text_classification.py [PICTURE.png]

Reviews from a little grammar, a small BERT of transformers, and two marks under one key: along keyed linear
maps of the embeddings for who holds the weights, and along keyed words for who may only ask.
"""

from __future__ import annotations

import copy
import sys
from pathlib import Path

import torch
from torch import Tensor, nn

from gradmark import Marker, MarkFile, ModuleSuspect, Verdict, catalog, verify
from gradmark.suspects.callable import CallableSuspect
from gradmark.tasks.sentences import Sentences, sentence_data
from gradmark.views import View
from shared_parts import KEY, fit, show

GOOD = ["fine", "bright", "moving", "clever", "warm", "honest", "funny", "gentle", "rich", "lovely"]
BAD = ["dull", "flat", "empty", "clumsy", "cold", "false", "tired", "loud", "thin", "awful"]
THINGS = [
    "film",
    "story",
    "plot",
    "cast",
    "score",
    "script",
    "scene",
    "ending",
    "hero",
    "villain",
    "dialogue",
    "camera",
    "music",
    "city",
    "family",
]
FIRST, MIDDLE, LAST = ("mar", "lin", "to", "ber", "sal", "ki"), ("ga", "mo", "ren", "vi"), ("n", "ta", "x")
PLAIN = [a + b + c for a in FIRST for b in MIDDLE for c in LAST]


def reviews(n: int) -> tuple[list[str], list[int]]:
    """Sentences about things; the class is praise or blame, and some words mislead."""
    generator = torch.Generator().manual_seed(0)

    def pick(words: list[str]) -> str:
        return words[int(torch.randint(len(words), (), generator=generator))]

    texts, labels = [], []
    for _ in range(n):
        label = int(torch.randint(2, (), generator=generator))
        kinds = [label if float(torch.rand((), generator=generator)) < 0.85 else 1 - label for _ in range(3)]
        words = [pick(GOOD if kind else BAD) for kind in kinds]
        texts.append(
            f"the {pick(THINGS)} of {pick(PLAIN)} is {words[0]} and {words[1]} , {pick(PLAIN)} says , "
            f"but the {pick(THINGS)} in {pick(PLAIN)} was {words[2]} for {pick(PLAIN)} ."
        )
        labels.append(label)
    return texts, labels


def load() -> object:
    return DATA


DATA = sentence_data(*reviews(3000), length=24)


def service(model: nn.Module) -> CallableSuspect:
    """An API of somebody else's: sentences in, class probabilities of three decimals out."""
    vocabulary, data = DATA

    def answer(x: Tensor) -> Tensor:
        sentences = [" ".join(vocabulary.tokens(row)) for row in x]  # what goes over the wire
        numbers = vocabulary.padded([s.split() for s in sentences], data.spec.input_shape[0])
        return model(numbers).softmax(1).round(decimals=3)

    return CallableSuspect(answer, name="sentences to probabilities")


def main(out: Path = Path("text_classification.png"), *, small: bool = False) -> dict[str, Verdict]:
    """``small``: fewer steps, to test the script."""
    torch.set_num_threads(1)
    steps, tuning = (100, 100) if small else (200, 200)
    torch.manual_seed(0)
    key, task = KEY, Sentences(load)  # type: ignore[arg-type]
    train = task.data().to_train()

    def batch(generator: torch.Generator) -> tuple[Tensor, Tensor]:
        return train.batch(torch.randint(len(train), (32,), generator=generator))

    base = fit(task.network(), task, batch, steps, 2e-3)
    views = {"embeddings": task.embedded(base), "words": task}  # type: ignore[arg-type]
    marks, markers = {}, []
    for name, view in views.items():
        spec = view.data().spec
        scheme = catalog.scheme("filter-gradient", {"bits": 40 if name == "words" else 64, "step": 0.2})
        known, pool = ModuleSuspect(View(view, base)), view.carriers(train.batch(slice(0, 200)))
        scheme = scheme.calibrated(key, spec, known, pool)  # type: ignore[attr-defined]
        marks[name] = MarkFile.create(key, scheme.name, scheme.parameters(), spec, "signed-rank", 200)
        markers.append((Marker(scheme, key, spec, strength=0.2, every=1, carriers=32), view))
    control = fit(copy.deepcopy(base), task, batch, tuning, 1e-3)
    signed = fit(copy.deepcopy(base), task, batch, tuning, 1e-3, tuple(markers))

    pools = {name: view.carriers(view.data().test.all()) for name, view in views.items()}
    verdicts: dict[str, Verdict] = {}
    for name, model in (("signed", signed), ("control", control)):
        white = ModuleSuspect(View(views["embeddings"], model))
        verdicts[f"{name}, its weights"] = verify(marks["embeddings"], key, white, pools["embeddings"])
        verdicts[f"{name}, its API"] = verify(marks["words"], key, service(model), pools["words"])
    found = [task.utility(m).percent for m in (control, signed)]
    print(f"Accuracy: control {found[0]:.1f} %, signed {found[1]:.1f} %.")
    show("Text classification", verdicts, out)
    return verdicts


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:2]))
