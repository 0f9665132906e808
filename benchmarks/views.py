"""What of an input a network still knows in its last layer, of what tells inputs of one class apart.

    python benchmarks/views.py bench-out cifar10 3 speech-long 1 digits 1

Bits within a class (`feature-contrast`) follow features that are linear in a coarse view of the input. A network can give
them scores that do only as far as its last layer's input knows the feature: the share R2 of the feature's variance within
classes that is linear in what the last layer of an *unmarked* network sees, by ridge regression fitted on training inputs and
judged on test inputs. Trains the networks that aren't in the folder. Writes results/views.json, where what isn't asked for
keeps its rows, and prints the table; decisions 14 and 15 draw on it.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gradmark.bench.experiment import find_experiment
from gradmark.bench.run import one_thread
from gradmark.bench.store import Wanted, obtain
from gradmark.coarse import VIEWS, coarse
from gradmark.embed.heads import output_layer
from gradmark.files import atomic_write
from gradmark.protocols import Batch, ModelSpec
from gradmark.scores import mean_by

PATH = Path(__file__).parent / "results" / "views.json"
MOST = 6000  # inputs on either side
BATCH = 250
RIDGE = 0.01  # of the features' mean variance
KEYED = 64  # random sums of a view's numbers, as a key draws them
Table = dict[str, dict[str, Any]]


def seen_by_the_last_layer(model: nn.Module, x: Tensor) -> Tensor:
    """(b, D): the input of the layer whose output are the scores."""
    head = output_layer(model, x[:2])
    if head is None:
        raise SystemExit("The network doesn't end in a linear layer")
    got: list[Tensor] = []
    handle = head.register_forward_pre_hook(lambda _, given: got.append(given[0].detach().flatten(1)))
    with torch.no_grad():
        for start in range(0, len(x), BATCH):
            model(x[start : start + BATCH])
    handle.remove()
    return torch.cat(got).double()


def shares(model: nn.Module, fitted: Batch, judged: Batch, spec: ModelSpec, view: str) -> dict[str, Any]:
    """R2 on ``judged`` of each number of a view, and of keyed sums of them, mean [least, most]."""
    sides = []
    for x, labels in (fitted, judged):
        sides.append((seen_by_the_last_layer(model, x), coarse(spec, x, view).double(), labels))
    (hidden, wanted, labels), (hidden_too, wanted_too, labels_too) = sides
    classes = spec.n_classes
    known, feature = (mean_by(v, labels, classes) for v in (hidden, wanted))
    a, b = hidden - known[labels], wanted - feature[labels]
    a_too, b_too = hidden_too - known[labels_too], wanted_too - feature[labels_too]
    gram = a.T @ a
    weights = torch.linalg.solve(
        gram + RIDGE * gram.trace() / len(gram) * torch.eye(len(gram)).double(), a.T @ b
    )
    left = b_too - a_too @ weights

    def r2(directions: Tensor) -> list[float]:
        unexplained, whole = ((v @ directions).square().sum(0) for v in (left, b_too))
        return [round(float(v), 3) for v in 1 - unexplained / whole.clamp_min(1e-12)]

    n = wanted.shape[1]
    drawn = torch.randn(n, KEYED, generator=torch.Generator().manual_seed(1)).double()
    keyed = r2(drawn - drawn.mean(0) if view == "cells" else drawn)
    return {
        "each": dict(enumerate(r2(torch.eye(n).double()))) if view == "overall" else {},
        "keyed": [round(sum(keyed) / KEYED, 3), min(keyed), max(keyed)],
        "fitted": len(labels), "judged": len(labels_too), "last_layer": hidden.shape[1],
    }  # fmt: skip


def names(spec: ModelSpec, n: int) -> list[str]:
    """Of the ``n`` numbers of the overall view, in its order."""
    if spec.domain == "signal":
        return ["loudness", "centre in time", "spread in time", "zero crossings"]
    hues = [f"hue {i}" for i in range(1, n - 5)]
    return [
        "brightness",
        *hues,
        "fineness",
        "slant",
        "contrast",
        "upper less lower half",
        "middle less whole",
    ]


def measured(task: str, seed: int, folder: Path) -> dict[str, Any]:
    experiment = find_experiment(task)
    data = experiment.data()
    model = obtain(Wanted(task, "control", seed), folder)
    train, test = data.to_train(), data.test
    pairs = [split.batch(slice(0, min(MOST, len(split)))) for split in (train, test)]
    found: dict[str, Any] = {}
    for view in VIEWS:
        row = shares(model, pairs[0], pairs[1], data.spec, view)
        each = row["each"].values()
        row["each"] = dict(zip(names(data.spec, len(each)), each, strict=True)) if each else {}
        found[view] = row
    return {"seed": seed, **found}


def told(rows: Table) -> str:
    lines = [
        "| task | view | keyed sums of it: mean R2 [least, most] | each number by itself |",
        "|---|---|---|---|",
    ]
    for task, row in rows.items():
        for view in VIEWS:
            mean, least, most = row[view]["keyed"]
            each = ", ".join(f"{name} {value:.2f}" for name, value in row[view]["each"].items())
            lines.append(f"| {task} | {view} | {mean:.2f} [{least:.2f}, {most:.2f}] | {each} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, help="a folder of `gradmark bench`")
    parser.add_argument("networks", nargs="+", metavar="TASK SEED")
    given = parser.parse_args()
    rows: Table = json.loads(PATH.read_text()) if PATH.exists() else {}
    for task, seed in zip(given.networks[::2], given.networks[1::2], strict=True):
        rows[task] = measured(task, int(seed), given.out / "networks")
        atomic_write(PATH, (json.dumps(rows, indent=1) + "\n").encode(), overwrite=True)
    print(told(rows))


if __name__ == "__main__":
    one_thread()
    main()
