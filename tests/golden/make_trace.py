"""How the golden copy was made from the golden ensemble, as ``make.py`` made its model: never rerun."""

from __future__ import annotations

import json
from dataclasses import replace

import torch

from golden.make import CARRIERS, HERE, QUERIES, net
from gradmark import MarkFile, OwnerKey
from gradmark.data import load_data
from gradmark.embed import Recipe, train
from gradmark.suspects import ModuleSuspect, load_weights, save_weights, weights_digest
from gradmark.trace import copying, create, default_probes, open_tracing, trace

LICENSEE = "Ünïted Widgets"
OTHERS = [f"licensee {i}" for i in range(99)]


def main() -> None:
    torch.set_num_threads(1)
    model_file, mark_file, expected_file = (
        HERE / name for name in ("golden-copy-v1.safetensors", "trace-v1.json", "expected-trace-v1.json")
    )
    data, key = load_data("digits"), OwnerKey.load(HERE / "key-v1.json")
    base_mark, base, copied = MarkFile.load(HERE / "mark-ensemble-v1.json"), net(), net()
    for model in (base, copied):
        load_weights(model, HERE / "golden-ensemble-v1.safetensors")
    base.eval()
    probes = default_probes(data.spec, {"bits": 64, "step": 0.1})
    mark = create(base_mark, key, probes, ModuleSuspect(base), data.test.all(), weights_digest(base))
    mark = replace(mark, salt=bytes(16), commitment=key.commit(mark.statement(), bytes(16)))
    mark.save(mark_file)
    rider = copying(open_tracing(mark, key, base_mark), LICENSEE, base, anchor=1.0, strength=2.0)
    train(copied, data.to_train(), Recipe(epochs=8, lr=1e-3, smoothing=0.1), marker=rider)
    save_weights(copied, model_file)
    stored = net().eval()
    load_weights(stored, model_file)
    expected: dict[str, object] = {"mark": mark.digest, "licensee": LICENSEE}
    pool = data.test.batch(slice(0, CARRIERS))
    for access in ("white", "black"):
        found = trace(
            mark,
            base_mark,
            key,
            ModuleSuspect(stored),
            pool,
            [*OTHERS, LICENSEE],
            access=access,
            queries=2 * QUERIES,
        )
        expected[access] = {
            "log10_p": found.log10_p,
            "named": [one.licensee for one in found.named],
            "queries": found.queries,
        }
    bits = open_tracing(mark, key, base_mark).codebook.table([LICENSEE])[0]
    expected["bits"] = [int(b) for b in bits]
    with expected_file.open("x") as file:
        file.write(json.dumps(expected) + "\n")
    print({name: expected[name] for name in ("white", "black")})


if __name__ == "__main__":
    main()
