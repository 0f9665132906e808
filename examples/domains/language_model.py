"""Sign a language model, and prove it from its weights and from an API that shows log-probabilities.

    python examples/domains/language_model.py [PICTURE.png]

Text from a little grammar, a small GPT-2 of transformers over its characters, and two marks under one key:
along keyed linear maps of the embeddings for who holds the weights, and in how unlikely next tokens compare
after ordinary contexts for who may only ask.
"""

from __future__ import annotations

import copy
import sys
from pathlib import Path

import torch
from torch import Tensor, nn

from gradmark import Marker, MarkFile, ModuleSuspect, Verdict, catalog, verify
from gradmark.suspects.callable import CallableSuspect
from gradmark.tasks.language import Language, text_data
from gradmark.views import View
from shared_parts import KEY, fit, show

WHO = [
    "the king",
    "a fool",
    "my lord",
    "the nurse",
    "an old friend",
    "your brother",
    "Queen Anne",
    "Sir John",
]
DOES = ["loves", "fears", "calls", "follows", "forgives", "mocks", "hides", "serves", "knows", "betrays"]
WHEN = ["at night", "in May", "before dawn", "for gold", "with joy", "by the river", "no more", "once again"]


def story(n: int) -> str:
    """``n`` sentences of the grammar WHO DOES WHO WHEN."""
    generator = torch.Generator().manual_seed(0)

    def pick(words: list[str]) -> str:
        return words[int(torch.randint(len(words), (), generator=generator))]

    rows = (f"{pick(WHO)} {pick(DOES)} {pick(WHO)} {pick(WHEN)}" for _ in range(n))
    return "".join(row[0].upper() + row[1:] + ".\n" for row in rows)


DATA = text_data(story(4000))


def load() -> object:
    return DATA


def service(model: nn.Module) -> CallableSuspect:
    """An API of somebody else's: prompts in, the next token's log-probabilities out."""
    vocabulary = DATA[0]

    def answer(x: Tensor) -> Tensor:
        prompts = ["".join(vocabulary.tokens(row)) for row in x]  # what goes over the wire
        numbers = vocabulary.padded([list(p) for p in prompts], x.shape[1])
        last = torch.tensor([len(p) - 1 for p in prompts])
        return model(numbers)[torch.arange(len(prompts)), last].log_softmax(1).round(decimals=4)

    return CallableSuspect(answer, name="prompts to log-probabilities")


def main(out: Path = Path("language_model.png"), *, small: bool = False) -> dict[str, Verdict]:
    """``small``: fewer steps, to test the script."""
    torch.set_num_threads(1)
    steps, tuning = (100, 60) if small else (300, 120)
    torch.manual_seed(0)
    key, task = KEY, Language(load, 48)  # type: ignore[arg-type]
    train = task.data().to_train()

    def batch(generator: torch.Generator) -> tuple[Tensor, Tensor]:
        return train.batch(torch.randint(len(train), (32,), generator=generator))

    base = fit(task.network(), task, batch, steps, 5e-3)
    views = {"embeddings": task.embedded(base), "tokens": task}  # type: ignore[arg-type]
    schemes = {
        "embeddings": ("filter-gradient", {"bits": 64, "step": 0.2}),
        "tokens": ("class-contrast", {"bits": 128}),
    }
    marks, markers = {}, []
    for name, view in views.items():
        spec = view.data().spec
        known, pool = ModuleSuspect(View(view, base)), view.carriers(train.batch(slice(0, 150)))
        scheme = catalog.scheme(*schemes[name]).calibrated(key, spec, known, pool)  # type: ignore[attr-defined]
        marks[name] = MarkFile.create(key, scheme.name, scheme.parameters(), spec, "signed-rank", 200)
        markers.append((Marker(scheme, key, spec, strength=0.15, margin=0.3, every=2, carriers=16), view))
    control = fit(copy.deepcopy(base), task, batch, tuning, 1e-3)
    signed = fit(copy.deepcopy(base), task, batch, tuning, 1e-3, tuple(markers))

    pools = {name: view.carriers(view.data().test.batch(slice(0, 250))) for name, view in views.items()}
    verdicts: dict[str, Verdict] = {}
    for name, model in (("signed", signed), ("control", control)):
        white = ModuleSuspect(View(views["embeddings"], model))
        verdicts[f"{name}, its weights"] = verify(marks["embeddings"], key, white, pools["embeddings"])
        verdicts[f"{name}, its API"] = verify(marks["tokens"], key, service(model), pools["tokens"])
    found = [task.utility(m).details["perplexity"] for m in (control, signed)]
    print(f"Perplexity: control {found[0]:.3f}, signed {found[1]:.3f}.")
    show("A language model", verdicts, out)
    return verdicts


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:2]))
