"""What the design rests on, one change at a time, on digits (3 seeds; the test split stays untouched).

    python benchmarks/ablation.py [--work DIR]

900 images train, the other 297 of the training split are carriers and measure accuracy. After
cifar10.py, which leaves a trained control in DIR, one choice is also undone on ResNet-20.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import nn

from cifar import load_cifar, resnet20, shifted
from gradmark import FilterGradient, Marker, MarkFile, ModelSpec, OwnerKey, __version__, verify
from gradmark.bench.networks import DigitsNet
from gradmark.data import Split, load_data
from gradmark.embed import Recipe, accuracy_of, marker, train
from gradmark.errors import ModelError
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
    "a margin that is never met (100 logits): no gate, no hinge": {"options": {"margin": 100.0}},
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


def on_resnet(work: Path, mode: Callable[[nn.Module], Any] | None) -> dict[str, float]:
    """120 marked steps of the unmarked CIFAR-10 control: mean reading while training, and right after."""
    x, y, x_test, y_test = load_cifar(work / "cifar.npz")
    net = resnet20()
    net.load_state_dict(torch.load(work / "control-0.ckpt", weights_only=True)["net"])
    spec, key, steps = ModelSpec("image", (3, 32, 32), 10, 0.0, 1.0, 255), OwnerKey.from_seed(7000), 120
    hand = Marker(FilterGradient(), key, spec, every=1, method="central-difference")
    optimizer = torch.optim.SGD(net.parameters(), 0.05, 0.9, weight_decay=5e-4, nesterov=True)
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(len(x), generator=generator)
    net.train()
    with patch.object(marker, "penalty_mode", mode) if mode else nullcontext():
        for step, index in enumerate(order[: steps * 128].split(128)):
            optimizer.param_groups[0]["lr"] = (
                0.05 * min(1, (step + 1) / 20) * (1 + math.cos(math.pi * step / steps)) / 2
            )
            batch = shifted(x[index], generator).float() / 255, y[index]
            with torch.autocast("cpu", torch.bfloat16):
                loss = F.cross_entropy(net(batch[0]), batch[1]) + hand.penalty(net, batch)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    mark = MarkFile.create(key, "filter-gradient", FilterGradient().parameters(), spec, "signed-rank", 1000)
    v = verify(mark, key, ModuleSuspect(net), (x_test[:1000].float() / 255, y_test[:1000]))
    after = float((v.reading.values * v.reading.bits).mean())
    return {"mean reading while training": float(hand._readings.mean()), "after": after, "log10 p": v.log10_p}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--work", type=Path, default=Path(__file__).parent / "work")
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
    path = RESULTS.with_name("ablation-resnet.json")
    if (args.work / "control-0.ckpt").exists() and not path.exists():
        modes = {"batch statistics (default)": None, "running statistics": evaluation_mode}
        table: dict[str, Any] = {}
        for name, mode in modes.items():
            try:
                table[name] = on_resnet(args.work, mode)
            except ModelError as error:  # a diverged training is a result too
                table[name] = {"diverged": str(error)}
        path.write_text(json.dumps(table, indent=1) + "\n")
        print(table)


if __name__ == "__main__":
    main()
