"""How the golden mark with joint bits was made, as ``make.py`` did: never rerun, never overwritten.

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
from gradmark.schemes.trigger import Trigger
from gradmark.suspects import ModuleSuspect, load_weights, save_weights
from gradmark.verify import verify

EPOCHS = 25


def main() -> None:
    torch.set_num_threads(1)
    model_file, mark_file, expected_file = (
        HERE / name
        for name in ("golden-joint-v1.safetensors", "mark-joint-v1.json", "expected-joint-v1.json")
    )
    data, key = load_data("digits"), OwnerKey.load(HERE / "key-v1.json")
    torch.manual_seed(0)
    control, model = net(), net()
    train(control, data.to_train(), Recipe(epochs=EPOCHS))
    parts = (FilterGradient(bits=32, step=0.1), ClassContrast(bits=48), Trigger(bits=24))
    scheme = Ensemble(parts).calibrated(key, data.spec, ModuleSuspect(control), data.test.all())
    MarkFile.create(
        key, scheme.name, scheme.parameters(), data.spec, "signed-rank", CARRIERS, salt=bytes(16)
    ).save(mark_file)
    marker = Marker(scheme, key, data.spec, budget=1.0, carriers=64, every=1)
    train(model, data.to_train(), Recipe(epochs=EPOCHS, smoothing=0.1, seed=2), marker=marker)
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
    marks = scheme.mark(key, data.spec).reference
    expected["references"] = [values.tolist() for values in marks if values is not None]
    with expected_file.open("x") as file:
        file.write(json.dumps(expected) + "\n")
    print({name: expected[name] for name in ("accuracy", "white", "black")})


if __name__ == "__main__":
    main()
