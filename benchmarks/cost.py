"""What the mark costs: training steps and white-box verification of ResNet-20, interleaved in one run.

    python benchmarks/cost.py [--rounds 12]

Ratios of seconds, medians over interleaved rounds with their quartiles; absolute times on these
machines mean nothing. ``full-batch double backward`` is GradSigns' way: the exact gradient of the whole
batch's loss with respect to its input, penalised on every step.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from cifar import resnet20
from gradmark import FilterGradient, Marker, MarkFile, ModelSpec, OwnerKey, __version__, verify
from gradmark.suspects import ModuleSuspect

RESULTS = Path(__file__).parent / "results" / "cost.json"
SPEC = ModelSpec("image", (3, 32, 32), 10, 0.0, 1.0, 255)
STEPS = 4  # one period of the default penalty


def step(marker: Marker | None, double: bool = False) -> Callable[[], None]:
    torch.manual_seed(0)
    net = resnet20().to(memory_format=torch.channels_last).train()
    optimizer = torch.optim.SGD(net.parameters(), 0.01, 0.9)
    x = torch.rand(128, 3, 32, 32).to(memory_format=torch.channels_last)
    y = torch.randint(0, 10, (128,))
    direction = torch.randn_like(x)

    def run() -> None:
        for _ in range(STEPS):
            images = x.detach().requires_grad_(double)
            loss = F.cross_entropy(net(images), y)
            if marker is not None:
                loss = loss + marker.penalty(net, (x, y))
            if double:
                (gradient,) = torch.autograd.grad(loss, images, create_graph=True)
                loss = loss + 0.01 * F.relu(1 - (gradient * direction).sum())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    return run


def verification() -> dict[str, Callable[[], Any]]:
    net, key, scheme = resnet20().eval(), OwnerKey.from_seed(0), FilterGradient()
    mark = MarkFile.create(key, scheme.name, scheme.parameters(), SPEC, "signed-rank", 200)
    x, y = torch.rand(200, 3, 32, 32), torch.randint(0, 10, (200,))
    suspect = ModuleSuspect(net)

    def plain() -> None:
        net.zero_grad()
        F.cross_entropy(net(x), y).backward()

    return {
        "forward and backward": plain,
        "verify": lambda: verify(mark, key, suspect, (x, y), access="white"),
    }


def interleaved(sides: dict[str, Callable[[], Any]], rounds: int) -> dict[str, dict[str, float]]:
    """Each side's time over the first side's, round by round."""
    for run in sides.values():
        run()
    first, ratios = next(iter(sides)), {name: [] for name in sides}
    for _ in range(rounds):
        times = {}
        for name, run in sides.items():
            start = time.perf_counter()
            run()
            times[name] = time.perf_counter() - start
        for name in sides:
            ratios[name].append(times[name] / times[first])
    return {
        name: dict(
            zip(("low", "median", "high"), np.quantile(r, (0.25, 0.5, 0.75)).round(3).tolist(), strict=True)
        )
        for name, r in ratios.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    key = OwnerKey.from_seed(0)

    def marker(**options: Any) -> Marker:
        return Marker(FilterGradient(), key, SPEC, **options)

    training = {
        "plain": step(None),
        "default (central difference, 32 carriers, every 4th step)": step(marker()),
        "exact (double backward, 32 carriers, every 4th step)": step(marker(method="exact")),
        "central difference, 32 carriers, every step": step(marker(every=1)),
        "exact, 32 carriers, every step": step(marker(every=1, method="exact")),
        "full-batch double backward, every step": step(None, double=True),
    }
    table = {
        "training": interleaved(training, args.rounds),
        "verification, 200 carriers": interleaved(verification(), args.rounds),
        "rounds": args.rounds,
        "versions": {"gradmark": __version__, "torch": torch.__version__},
    }
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    RESULTS.write_text(json.dumps(table, indent=1) + "\n")
    print(json.dumps(table, indent=1))


if __name__ == "__main__":
    main()
