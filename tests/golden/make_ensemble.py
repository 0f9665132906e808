"""How the golden ensemble was made, as ``make.py`` made the golden model: never rerun, never overwritten.

It trained an unmarked network for the reference, and then the marked one, with the same public key.
"""

from __future__ import annotations

import json

import torch

from golden.make import CARRIERS, HERE, QUERIES, net
from gradmark import FilterGradient, Marker, MarkFile, OwnerKey
from gradmark.data import load_data
from gradmark.embed import Recipe, accuracy_of, train
from gradmark.ensemble import Ensemble
from gradmark.schemes.class_contrast import ClassContrast
from gradmark.suspects import ModuleSuspect, load_weights, save_weights
from gradmark.verify import verify

EPOCHS = 25


def main() -> None:
    parts = (FilterGradient(bits=32, step=0.1), ClassContrast(bits=48))  # 48 of 80: classes share bits
    make("ensemble", Ensemble(parts, joint=False), seed=1)


def make(name: str, plain: Ensemble, *, seed: int) -> None:
    """Train the networks, and write the marked one (``seed``: its training's), its mark and its readings."""
    torch.set_num_threads(1)
    model_file, mark_file, expected_file = (
        HERE / file
        for file in (f"golden-{name}-v1.safetensors", f"mark-{name}-v1.json", f"expected-{name}-v1.json")
    )
    data, key = load_data("digits"), OwnerKey.load(HERE / "key-v1.json")
    torch.manual_seed(0)
    control, model = net(), net()
    train(control, data.to_train(), Recipe(epochs=EPOCHS))
    scheme = plain.calibrated(key, data.spec, ModuleSuspect(control), data.test.all())
    MarkFile.create(
        key, scheme.name, scheme.parameters(), data.spec, "signed-rank", CARRIERS, salt=bytes(16)
    ).save(mark_file)
    marker = Marker(scheme, key, data.spec, budget=1.0, carriers=64, every=1)
    train(model, data.to_train(), Recipe(epochs=EPOCHS, smoothing=0.1, seed=seed), marker=marker)
    save_weights(model, model_file)
    stored = net().eval()
    load_weights(stored, model_file)
    mark, suspect = MarkFile.load(mark_file), ModuleSuspect(stored)
    pool = data.test.batch(slice(0, CARRIERS))
    right, n = accuracy_of(stored, data.test)
    expected: dict[str, object] = {"accuracy": right / n, "mark": mark.digest, "suspect": suspect.digest}
    for access in ("white", "black"):
        v = verify(mark, key, suspect, pool, access=access, queries=QUERIES)
        assert v.reading is not None
        expected[access] = {
            "log10_p": v.log10_p, "n_match": v.n_match, "ties": v.ties, "queries": v.queries,
            "parts": list(v.reading.parts),
            "readings": [round(r, 7) for r in v.reading.values.tolist()],
            "bits": [int(b) for b in v.reading.bits.tolist()],
        }  # fmt: skip
    references = scheme.mark(key, data.spec).reference
    expected["references"] = [values.tolist() for values in references if values is not None]
    with expected_file.open("x") as file:
        file.write(json.dumps(expected) + "\n")
    print({name: expected[name] for name in ("accuracy", "white", "black")})


if __name__ == "__main__":
    main()
