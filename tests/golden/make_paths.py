"""How the golden mark in products of weights was made, as ``make.py`` made the golden model: never rerun.

A residual network, so that the mark file holds profiles of its stream's channels.
"""

from __future__ import annotations

import json

import torch
from torch import nn

from golden.make import CARRIERS, HERE
from gradmark import Marker, MarkFile, OwnerKey
from gradmark.bench.networks import Block
from gradmark.data import load_data
from gradmark.embed import Recipe, accuracy_of, train
from gradmark.schemes.path_weights import PathWeights
from gradmark.suspects import ModuleSuspect, load_weights, save_weights
from gradmark.verify import verify

EPOCHS = 25


def residual() -> nn.Module:
    """A stem, two residual blocks of width 8 and a linear layer: 3,738 weights."""
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, 1, 1), nn.ReLU(), Block(8, 8, 1), Block(8, 8, 2), nn.Flatten(), nn.Linear(128, 10)
    )


def main() -> None:
    torch.set_num_threads(1)
    model_file, mark_file, expected_file = (
        HERE / name
        for name in ("golden-paths-v1.safetensors", "mark-paths-v1.json", "expected-paths-v1.json")
    )
    data, key = load_data("digits"), OwnerKey.load(HERE / "key-v1.json")
    torch.manual_seed(0)
    control = residual()
    model = residual()
    model.load_state_dict(control.state_dict())
    train(control, data.to_train(), Recipe(epochs=EPOCHS))
    pool = data.test.batch(slice(0, CARRIERS))
    scheme = PathWeights(bits=64).calibrated(key, data.spec, ModuleSuspect(control.eval()), pool)
    MarkFile.create(
        key, scheme.name, scheme.parameters(), data.spec, "signed-rank", CARRIERS, salt=bytes(16)
    ).save(mark_file)
    marker = Marker(scheme, key, data.spec, budget=1.0, carriers=64, every=1)
    train(model, data.to_train(), Recipe(epochs=EPOCHS, seed=1), marker=marker)
    save_weights(model, model_file)
    stored = residual().eval()
    load_weights(stored, model_file)
    mark, suspect = MarkFile.load(mark_file), ModuleSuspect(stored)
    right, n = accuracy_of(stored, data.test)
    v = verify(mark, key, suspect, pool, access="white")
    assert v.reading is not None
    expected: dict[str, object] = {"accuracy": right / n, "mark": mark.digest, "suspect": suspect.digest}
    expected["white"] = {
        "log10_p": v.log10_p, "n_match": v.n_match, "ties": v.ties, "queries": v.queries,
        "readings": [round(r, 7) for r in v.reading.values.tolist()],
        "bits": [int(b) for b in v.reading.bits.tolist()],
    }  # fmt: skip
    with expected_file.open("x") as file:
        file.write(json.dumps(expected) + "\n")
    print({name: expected[name] for name in ("accuracy", "white")})


if __name__ == "__main__":
    main()
