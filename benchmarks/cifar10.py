"""CIFAR-10, ResNet-20: fidelity and evidence, marked from scratch and marked afterwards, 3 seeds.

    python benchmarks/cifar10.py [--seeds 0 1 2] [--threads 1] [--work DIR]

Per seed: an unmarked control (20 epochs from scratch); a marked twin on the same schedule, seed and
data order, whose mark joins for the last 4 epochs (it branches off the control's checkpoint there,
which is the same as training it from scratch, since nothing differs before); the control marked
afterwards for 2 epochs, beside the control trained on for the same 2 epochs unmarked. Then the front:
other strengths, seed 0. Nothing here was tuned on the test images or on these keys: settings come
from a development key and 5,000 images held out of training.

Every run resumes from its checkpoint after a kill; every cell is one JSON under results/cifar10/.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from pathlib import Path
from typing import Any

import torch

from cifar import AFTERWARDS, FROM_SCRATCH, correct, described, fit, load_cifar, resnet20
from gradmark import FilterGradient, Marker, MarkFile, ModelSpec, OwnerKey, __version__, verify
from gradmark.stats import wilson_interval
from gradmark.suspects import ModuleSuspect

RESULTS = Path(__file__).parent / "results" / "cifar10"
SPEC = ModelSpec("image", (3, 32, 32), 10, 0.0, 1.0, 255)
JOIN = 16  # epoch at which the mark joins a training from scratch: the first at full image size
FRONT = (0.25, 1.0, 2.0)  # budgets beside the default


def versions() -> dict[str, str]:
    return {"gradmark": __version__, "torch": torch.__version__, "python": platform.python_version()}


def cell(
    name: str, net: Any, seed: int, data: tuple[Any, ...], key: OwnerKey, extra: dict[str, Any]
) -> dict[str, Any]:
    """Accuracy on 10,000 test images; verdicts by 5 disjoint sets of 200 test carriers each way."""
    x, y = data
    right, start = correct(net, x, y), time.perf_counter()
    scheme = FilterGradient()
    mark = MarkFile.create(key, scheme.name, scheme.parameters(), SPEC, "signed-rank", 200)
    suspect, verdicts = ModuleSuspect(net), []
    for part in range(5):
        pool = x[part * 200 : part * 200 + 200].float() / 255, y[part * 200 : part * 200 + 200]
        for access, queries in (("white", 2), ("black", 2000)):
            v = verify(mark, key, suspect, pool, access=access, queries=queries)
            verdicts.append(
                {
                    k: v.to_json()[k]
                    for k in ("access", "queries", "log10_p", "match", "n_match", "ties", "outcome")
                }
                | {"part": part}
            )
    low, high = wilson_interval(right, len(y))
    row = {
        "name": name,
        "seed": seed,
        "accuracy": right / len(y),
        "accuracy_95": [low, high],
        "verdicts": verdicts,
    }
    return row | {
        "key": f"OwnerKey.from_seed({seed})",
        "seconds": round(time.perf_counter() - start, 1),
        **extra,
        "versions": versions(),
    }


def run(
    name: str,
    seed: int,
    work: Path,
    data: tuple[Any, ...],
    *,
    start_from: Path | None = None,
    weights_of: Path | None = None,
    **settings: Any,
) -> None:
    """Train (or resume) one network and write its cell, unless the cell is there already."""
    out = RESULTS / f"{name}-{seed}.json"
    if out.exists():
        return
    x, y, x_test, y_test = data
    torch.manual_seed(seed)
    net = resnet20()
    schedule = AFTERWARDS if weights_of else FROM_SCRATCH
    if weights_of:
        net.load_state_dict(torch.load(weights_of, weights_only=True)["net"])
    checkpoint = work / f"{name}-{seed}.ckpt"
    if start_from and not checkpoint.exists():
        checkpoint.write_bytes(start_from.read_bytes())
    key = OwnerKey.from_seed(seed)
    marker = (
        Marker(FilterGradient(), key, SPEC, seed=seed, **settings["marker"]) if "marker" in settings else None
    )
    keep = {JOIN: work / f"control-{seed}-epoch16.ckpt"} if name == "control" else None
    clock = time.perf_counter()
    order = seed + (100 if weights_of else 0)
    start = 0 if weights_of else JOIN
    fit(
        net,
        x,
        y,
        schedule,
        order,
        checkpoint,
        marker,
        start,
        keep,
        lambda line: print(f"{name}-{seed}: {line}", flush=True),
    )
    extra = {
        "schedule": described(schedule),
        "marker": None if marker is None else {"repr": repr(marker), **settings["marker"]},
    }
    row = cell(
        name, net, seed, (x_test, y_test), key, extra | {"train_seconds": round(time.perf_counter() - clock)}
    )
    RESULTS.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(row, indent=1) + "\n")
    shown = [(v["access"], v["queries"], round(v["log10_p"], 1)) for v in row["verdicts"][:2]]
    print(f"{name}-{seed}: accuracy {row['accuracy']:.4f} {shown}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--work", type=Path, default=Path(__file__).parent / "work")
    parser.add_argument("--only", nargs="*", default=["control", "scratch", "after", "front"])
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.work.mkdir(parents=True, exist_ok=True)
    data = load_cifar(args.work / "cifar.npz")
    for seed in args.seeds:
        control = args.work / f"control-{seed}.ckpt"
        if "control" in args.only:
            run("control", seed, args.work, data)
        if "scratch" in args.only:
            run(
                "scratch",
                seed,
                args.work,
                data,
                start_from=args.work / f"control-{seed}-epoch16.ckpt",
                marker={},
            )
        if "after" in args.only:
            run("after", seed, args.work, data, weights_of=control, marker={})
            run("after-control", seed, args.work, data, weights_of=control)
    if "front" in args.only and 0 in args.seeds:
        for budget in FRONT:
            run(
                f"front-{budget}",
                0,
                args.work,
                data,
                weights_of=args.work / "control-0.ckpt",
                marker={"budget": budget},
            )


if __name__ == "__main__":
    main()
