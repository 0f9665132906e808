"""The filter mark alone, with intervals: digits, 5 seeds, marked against control on the same schedule.

    python benchmarks/digits.py [--seeds 0 1 2 3 4]

Two tracks: the demo's small convolutional net with filter directions, and a plain MLP on the 64
pixels as a flat vector with pattern directions. 1,197 images train, 600 test; carriers are test images.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gradmark import FilterGradient, Marker, MarkFile, OwnerKey, __version__, verify
from gradmark.bench.networks import DigitsNet
from gradmark.data import Split, load_data
from gradmark.demo.run import RECIPE
from gradmark.embed import accuracy_of, train
from gradmark.protocols import ModelSpec
from gradmark.stats import mean_interval
from gradmark.suspects import ModuleSuspect

RESULTS = Path(__file__).parent / "results" / "digits"
SCHEME = FilterGradient(bits=128, kernel_size=5, step=0.1)
MARKER: dict[str, Any] = {"target_log10_p": -18.0, "budget": 0.5, "carriers": 64, "every": 1}


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10))


def flat(split: Split) -> Split:
    spec = ModelSpec("vector", (64,), 10, 0.0, 1.0, scale=1.0)
    return Split(split.x.flatten(1), split.y, spec)


def one(track: str, seed: int) -> dict[str, Any]:
    data = load_data("digits")
    sides = (data.to_train(), data.test) if track == "cnn" else (flat(data.to_train()), flat(data.test))
    spec, key = sides[0].spec, OwnerKey.from_seed(seed)
    row: dict[str, Any] = {"track": track, "seed": seed, "version": __version__, "torch": torch.__version__}
    nets = {}
    for side in ("control", "marked"):
        torch.manual_seed(seed)
        nets[side] = DigitsNet() if track == "cnn" else mlp()
        marker = Marker(SCHEME, key, spec, seed=seed, **MARKER) if side == "marked" else None
        train(nets[side], sides[0], replace(RECIPE, seed=seed), marker=marker)
        right, n = accuracy_of(nets[side], sides[1])
        row[f"accuracy_{side}"] = right / n
    mark = MarkFile.create(key, SCHEME.name, SCHEME.parameters(), spec, "signed-rank", 200)
    stranger = OwnerKey.from_seed(seed + 1000)
    other = MarkFile.create(stranger, SCHEME.name, SCHEME.parameters(), spec, "signed-rank", 200)
    asked = (
        ("owner", mark, key, "marked"),
        ("control", mark, key, "control"),
        ("wrong key", other, stranger, "marked"),
    )
    for who, file, holder, side in asked:
        for access in ("white", "black"):
            v = verify(file, holder, ModuleSuspect(nets[side]), sides[1].all(), access=access, queries=2000)
            row[f"{who}, {access}"] = {
                "log10_p": v.log10_p,
                "match": v.match,
                "queries": v.queries,
                "outcome": v.outcome,
            }
    return row | {"scheme": SCHEME.parameters(), "marker": MARKER, "recipe": asdict(RECIPE)}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2, 3, 4])
    args = parser.parse_args()
    torch.set_num_threads(1)
    RESULTS.mkdir(parents=True, exist_ok=True)
    for track in ("cnn", "mlp"):
        rows = []
        for seed in args.seeds:
            path = RESULTS / f"{track}-{seed}.json"
            if not path.exists():
                path.write_text(json.dumps(one(track, seed), indent=1) + "\n")
            rows.append(json.loads(path.read_text()))
        cost = [100 * (r["accuracy_control"] - r["accuracy_marked"]) for r in rows]
        low, high = mean_interval(cost)
        worst = [max(r[f"owner, {a}"]["log10_p"] for r in rows) for a in ("white", "black")]
        print(
            f"{track}: accuracy cost {sum(cost) / len(cost):.2f} points [{low:.2f}, {high:.2f}],",
            f"weakest log10 p white {worst[0]:.1f}, black {worst[1]:.1f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
