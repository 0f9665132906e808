"""Does a cheaper penalty leave the evidence? Digits, the flagship, fewer carriers and rarer steps.

    python benchmarks/cheap.py [--seeds 0 1 2]

One control a seed calibrates all settings. ``rows`` is what the penalty adds to a training step: inputs that
pass the network a step, on the average, beside the batch's 64. No penalty goes through a new last layer. Finished rows are kept and not done again.
"""

from __future__ import annotations

import argparse
import itertools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gradmark import Marker, MarkFile, ModuleSuspect, OwnerKey, __version__, catalog, verify
from gradmark.bench.networks import DigitsNet
from gradmark.data import load_data
from gradmark.embed import Recipe, accuracy_of, train
from gradmark.ensemble import Ensemble
from gradmark.protocols import Batch

RESULTS = Path(__file__).parent / "results" / "cheap"
RECIPE = Recipe(epochs=25)
SETTINGS = (
    (32, 4, False, False), (32, 4, True, False), (16, 4, True, False), (16, 4, False, False),
    (64, 1, False, False), (16, 8, False, False), (32, 4, False, True), (32, 4, True, True),
)  # fmt: skip
"""Carriers, every, ease, whether the task's own scores are shared."""
LONG = ((32, 4, False, False), (32, 16, False, True), (32, 16, False, False))
"""The same over four times as many steps: is it the number of penalties that counts, or how often they come?"""


class Sharing:
    """A marker that is given the scores of the forward pass before it."""

    def __init__(self, marker: Marker, net: nn.Module) -> None:
        self.marker, self.state_dict, self.load_state_dict = marker, marker.state_dict, marker.load_state_dict
        self.status, self.last = marker.status, None
        net.register_forward_hook(self.keep)

    def keep(self, net: nn.Module, _: Any, out: Tensor) -> None:
        self.last = out

    def penalty(self, model: nn.Module, batch: Batch) -> Tensor:
        return self.marker.penalty(model, batch, self.last)


def scheme() -> Ensemble:
    made = catalog.scheme("ensemble", {"bits": 128, "kernel_size": 5, "step": 0.1})
    assert isinstance(made, Ensemble)
    return made


def one(seed: int, folder: Path, long: bool) -> None:
    """A control, then every setting beside it that isn't done."""
    data, key = load_data("digits"), OwnerKey.from_seed(seed)
    recipe, ending = replace(RECIPE, seed=seed), f"{'-long' if long else ''}-{seed}.json"
    recipe = replace(recipe, epochs=4 * recipe.epochs) if long else recipe
    todo = [(*one, folder / f"{_name(*one)}{ending}") for one in (LONG if long else SETTINGS)]
    if all(path.exists() for *_, path in todo):
        return
    torch.manual_seed(seed)
    control = DigitsNet()
    train(control, data.to_train(), recipe)
    given = scheme().calibrated(key, data.spec, ModuleSuspect(control), data.to_train().all())
    mark = MarkFile.create(key, given.name, given.parameters(), data.spec, "signed-rank", 200)
    right, n = accuracy_of(control, data.test)
    for carriers, every, ease, sharing, path in todo:
        if path.exists():
            continue
        torch.manual_seed(seed)
        net = DigitsNet()
        seen: list[int] = []
        counted = net.register_forward_hook(lambda _, x, __, seen=seen: seen.append(len(x[0])))
        chosen: dict[str, Any] = {"carriers": carriers, "every": every, "ease": ease, "new_heads": False}
        marker = Marker(given, key, data.spec, seed=seed, **chosen)
        rider = Sharing(marker, net) if sharing else marker
        train(net, data.to_train(), replace(recipe, smoothing=0.1), marker=rider)
        counted.remove()
        steps = recipe.epochs * (len(data.to_train()) // recipe.batch_size)
        row: dict[str, Any] = {
            "carriers": carriers,
            "every": every,
            "ease": ease,
            "scores": sharing,
            "seed": seed,
        }
        row |= {"rows": sum(seen) / steps - recipe.batch_size, "steps": steps, "version": __version__}
        row |= {"accuracy_control": right / n, "accuracy_marked": accuracy_of(net, data.test)[0] / n}
        for access in ("white", "black"):
            v = verify(mark, key, ModuleSuspect(net), data.test.all(), access=access, queries=2000)
            row[access] = {"log10_p": v.log10_p, "match": v.match, "queries": v.queries}
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(row, indent=1) + "\n")
        print(row, flush=True)


def _name(carriers: int, every: int, ease: bool, sharing: bool) -> str:
    return f"{carriers}-{every}{'-ease' if ease else ''}{'-scores' if sharing else ''}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    args = parser.parse_args()
    torch.set_num_threads(1)
    RESULTS.mkdir(parents=True, exist_ok=True)
    for long, seed in itertools.product((False, True), args.seeds):
        one(seed, RESULTS, long)


if __name__ == "__main__":
    main()
