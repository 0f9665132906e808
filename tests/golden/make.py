"""How the golden model was made. Never rerun: the point is that old files verify.

It trained one tiny network on scikit-learn's digits with the public key ``key-v1.json``, and wrote the
weights, the mark and what a verification read when the files were new. It refuses to overwrite them. A
later version whose reading of the old files differs has broken every mark out there; then the code is
wrong, not the files.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import nn

from gradmark import FilterGradient, Marker, MarkFile, OwnerKey
from gradmark.data import load_data
from gradmark.embed import Recipe, accuracy_of, train
from gradmark.suspects import ModuleSuspect, load_weights, save_weights
from gradmark.verify import verify

HERE = Path(__file__).resolve().parent
CARRIERS, QUERIES = 200, 400


def net() -> nn.Module:
    """Two convolutions of width 8 with batch norms, and a linear layer: 2074 weights."""
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, 1, 1), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Flatten(), nn.Linear(128, 10),
    )  # fmt: skip


def main() -> None:
    torch.set_num_threads(1)
    model_file, mark_file, expected_file = (
        HERE / name for name in ("golden-v1.safetensors", "mark-model-v1.json", "expected-model-v1.json")
    )
    data, key = load_data("digits"), OwnerKey.load(HERE / "key-v1.json")
    scheme = FilterGradient(bits=64, step=0.1)
    marker = Marker(scheme, key, data.spec, target_log10_p=-18, budget=1.0, carriers=64, every=1)
    torch.manual_seed(0)
    model = net()
    train(model, data.to_train(), Recipe(epochs=40), marker=marker)
    parameters = scheme.parameters()
    MarkFile.create(key, scheme.name, parameters, data.spec, "signed-rank", CARRIERS, salt=bytes(16)).save(
        mark_file
    )
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
            "readings": [round(r, 7) for r in v.reading.values.tolist()],
            "bits": [int(b) for b in v.reading.bits.tolist()],
        }  # fmt: skip
    with expected_file.open("x") as file:
        file.write(json.dumps(expected) + "\n")
    print(
        {k: v if isinstance(v, (float, str)) else (v["log10_p"], v["n_match"]) for k, v in expected.items()}
    )


if __name__ == "__main__":
    main()
