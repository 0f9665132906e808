"""Does a cheaper penalty leave the evidence? Digits, the flagship, fewer carriers and rarer steps.

    python benchmarks/cheap.py [--seeds 0 1 2]

One control a seed calibrates all settings. ``rows`` is what the penalty adds to a training step: inputs that
pass the network a step, on the average, beside the batch's 64. Finished rows are kept and not done again.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from gradmark import Marker, MarkFile, ModuleSuspect, OwnerKey, __version__, catalog, verify
from gradmark.bench.networks import DigitsNet
from gradmark.data import load_data
from gradmark.embed import Recipe, accuracy_of, train
from gradmark.ensemble import Ensemble

RESULTS = Path(__file__).parent / "results" / "cheap"
RECIPE = Recipe(epochs=25)
SETTINGS = (
    (32, 4, False), (32, 4, True), (16, 4, True), (16, 4, False), (64, 1, False), (16, 8, False),
)  # fmt: skip
"""Carriers, every, ease."""


def scheme() -> Ensemble:
    made = catalog.scheme("ensemble", {"bits": 128, "kernel_size": 5, "step": 0.1})
    assert isinstance(made, Ensemble)
    return made


def one(seed: int, folder: Path) -> None:
    """A control, then every setting beside it that isn't done."""
    data, key = load_data("digits"), OwnerKey.from_seed(seed)
    todo = [(*one, folder / f"{_name(*one)}-{seed}.json") for one in SETTINGS]
    if all(path.exists() for *_, path in todo):
        return
    torch.manual_seed(seed)
    control = DigitsNet()
    train(control, data.to_train(), replace(RECIPE, seed=seed))
    given = scheme().calibrated(key, data.spec, ModuleSuspect(control), data.to_train().all())
    mark = MarkFile.create(key, given.name, given.parameters(), data.spec, "signed-rank", 200)
    right, n = accuracy_of(control, data.test)
    for carriers, every, ease, path in todo:
        if path.exists():
            continue
        torch.manual_seed(seed)
        net = DigitsNet()
        seen: list[int] = []
        counted = net.register_forward_hook(lambda _, x, __, seen=seen: seen.append(len(x[0])))
        marker = Marker(given, key, data.spec, seed=seed, carriers=carriers, every=every, ease=ease)
        train(net, data.to_train(), replace(RECIPE, seed=seed, smoothing=0.1), marker=marker)
        counted.remove()
        steps = RECIPE.epochs * (len(data.to_train()) // RECIPE.batch_size)
        row: dict[str, Any] = {"carriers": carriers, "every": every, "ease": ease, "seed": seed}
        row |= {"rows": sum(seen) / steps - RECIPE.batch_size, "version": __version__}
        row |= {"accuracy_control": right / n, "accuracy_marked": accuracy_of(net, data.test)[0] / n}
        for access in ("white", "black"):
            v = verify(mark, key, ModuleSuspect(net), data.test.all(), access=access, queries=2000)
            row[access] = {"log10_p": v.log10_p, "match": v.match, "queries": v.queries}
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(row, indent=1) + "\n")
        print(row, flush=True)


def _name(carriers: int, every: int, ease: bool) -> str:
    return f"{carriers}-{every}{'-ease' if ease else ''}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    args = parser.parse_args()
    torch.set_num_threads(1)
    RESULTS.mkdir(parents=True, exist_ok=True)
    for seed in args.seeds:
        one(seed, RESULTS)


if __name__ == "__main__":
    main()
