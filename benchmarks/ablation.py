"""What the design rests on, one change at a time, on digits (3 seeds; the test split stays untouched).

    python benchmarks/ablation.py

900 images train, the other 297 of the training split are carriers and measure accuracy.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import nn

from gradmark import FilterGradient, Marker, MarkFile, OwnerKey, __version__, verify
from gradmark.data import Split, load_data
from gradmark.demo.run import DigitsNet
from gradmark.embed import Recipe, accuracy_of, marker, train
from gradmark.stats import mean_interval
from gradmark.suspects import ModuleSuspect

RESULTS = Path(__file__).parent / "results" / "ablation.json"
BASE = FilterGradient(step=0.1)


def evaluation_mode(model: nn.Module) -> Any:
    """The alternative to ``penalty_mode``: running statistics under the penalty."""

    class Mode:
        def __enter__(self) -> None:
            model.eval()

        def __exit__(self, *_: object) -> None:
            model.train()

    return Mode()


VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "running statistics under the penalty": {"mode": evaluation_mode},
    "exact gradient instead of central difference": {"options": {"method": "exact"}},
    "each class its own directions and contrasts": {"scheme": replace(BASE, class_groups=10)},
    "no gate: every bit pushes all the time": {"options": {"margin": 1e6 / 4, "strength": 0.3}},
    "white kernels": {"scheme": replace(BASE, whitening=0.0)},
    "128 bits": {"scheme": replace(BASE, bits=128)},
    "penalty on every step": {"options": {"every": 1}},
    "budget 0.1": {"options": {"budget": 0.1}},
    "budget 2": {"options": {"budget": 2.0}},
}


def one(seed: int, variant: dict[str, Any] | None) -> dict[str, float]:
    data = load_data("digits").to_train()
    fit, held = (Split(data.x[s], data.y[s], data.spec) for s in (slice(0, 900), slice(900, None)))
    torch.manual_seed(seed)
    net, key = DigitsNet(), OwnerKey.from_seed(7000 + seed)
    scheme = (variant or {}).get("scheme", BASE)
    mode: Callable[[nn.Module], Any] | None = (variant or {}).get("mode")
    hand = None
    if variant is not None:
        hand = Marker(scheme, key, data.spec, seed=seed, **variant.get("options", {}))
    with patch.object(marker, "penalty_mode", mode) if mode else nullcontext():
        train(net, fit, Recipe(epochs=25, seed=seed), marker=hand)
    right, n = accuracy_of(net, held)
    row = {"accuracy": 100 * right / n}
    mark = MarkFile.create(key, scheme.name, scheme.parameters(), data.spec, "signed-rank", 200)
    for access in ("white", "black"):
        v = verify(mark, key, ModuleSuspect(net), held.all(), access=access, queries=2000)
        row |= {
            f"{access} log10 p": v.log10_p,
            f"{access} mean reading": float((v.reading.values * v.reading.bits).mean()),
        }
    return row


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    args = parser.parse_args()
    torch.set_num_threads(1)
    known = json.loads(RESULTS.read_text())["rows"] if RESULTS.exists() else {}
    for name, variant in {"unmarked control": None, **VARIANTS}.items():
        if name not in known:
            rows = [one(seed, variant) for seed in args.seeds]
            known[name] = {
                k: {"mean": sum(r[k] for r in rows) / len(rows), "95": mean_interval([r[k] for r in rows])}
                for k in rows[0]
            }
            RESULTS.parent.mkdir(parents=True, exist_ok=True)
            RESULTS.write_text(
                json.dumps({"seeds": args.seeds, "version": __version__, "rows": known}, indent=1) + "\n"
            )
        print(name, {k: round(v["mean"], 2) for k, v in known[name].items()}, flush=True)


if __name__ == "__main__":
    main()
