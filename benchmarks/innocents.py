"""Innocent until proven: third-party networks and our own unmarked and marked ones, 1,000 fresh keys each.

    python benchmarks/innocents.py [--keys 1000] [--work DIR]

None of these keys was ever embedded anywhere, so every p-value must be uniform and no claim made.
Randomised p-values (exactly uniform under the null, discreteness allowed for) go to a Kolmogorov-
Smirnov test; plain ones are counted below .05 and at alpha = 1e-6. Readings are white-box with 200
carriers, through the very code that verification uses; since they are linear in the gradient, each
network's Jacobian is taken once and shared by all keys.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from cifar import SHARED, load_cifar, resnet20
from gradmark import FilterGradient, ModelSpec, OwnerKey, __version__
from gradmark.stats import ks_uniform, randomised_p, run_test, wilson_interval
from gradmark.suspects import ModuleSuspect, open_suspect

RESULTS = Path(__file__).parent / "results" / "innocents"
POOL = 400
FIRST_KEY = 10_000  # seeds from here on are embedded nowhere


class Remembered:
    """A white box whose scores and Jacobian over a fixed pool were computed once."""

    def __init__(self, suspect: Any, x: Tensor) -> None:
        self.name, self.digest = suspect.name, suspect.digest
        self.place = {row.numpy().tobytes(): i for i, row in enumerate(x)}
        self.scores = suspect.query(x)
        unit = torch.eye(self.scores.shape[1])
        self.jacobian = torch.stack([suspect.vjp(x, row.expand(len(x), -1)) for row in unit], 1).flatten(2)

    def _rows(self, x: Tensor) -> list[int]:
        return [self.place[row.numpy().tobytes()] for row in x]

    def query(self, x: Tensor) -> Tensor:
        return self.scores[self._rows(x)]

    def vjp(self, x: Tensor, v: Tensor) -> Tensor:
        return torch.einsum("bc,bcp->bp", v, self.jacobian[self._rows(x)]).reshape(x.shape)


class Shared:
    """Directions computed once per key and batch, for all networks."""

    def __init__(self, inner: Any) -> None:
        self.inner, self.n, self.groups, self.known = inner, inner.n, inner.groups, {}

    def all(self, x: Tensor, group: Tensor) -> Tensor:
        name = (len(x), x[0].numpy().tobytes())
        if name not in self.known:
            self.known[name] = self.inner.all(x, group)
        return self.known[name]


def own(path: Path) -> nn.Module:
    net = resnet20()
    net.load_state_dict(torch.load(path, weights_only=True)["net"])
    return net.eval()


def family(spec: ModelSpec, networks: dict[str, Any], pool: tuple[Tensor, Tensor], keys: int) -> None:
    """Every network of one input format against all keys; one JSON per network."""
    scheme = FilterGradient()
    remembered = {name: Remembered(suspect, pool[0]) for name, suspect in networks.items()}
    rows: dict[str, list[tuple[float, float]]] = {name: [] for name in networks}
    coin = np.random.default_rng(0)
    for k in range(keys):
        mark = scheme.mark(OwnerKey.from_seed(FIRST_KEY + k), spec)
        mark = replace(mark, directions=Shared(mark.directions))
        for name, suspect in remembered.items():
            reading = scheme.read(mark, suspect, pool, access="white", carriers=200)
            values = (reading.values * reading.bits).numpy()
            rows[name].append(
                (run_test("signed-rank", values).log10_p, randomised_p("signed-rank", values, coin))
            )
        if k % 50 == 49:
            print(f"{spec.input_shape}: {k + 1} keys", flush=True)
    RESULTS.mkdir(parents=True, exist_ok=True)
    for name, pairs in rows.items():
        log10_p, p = np.array(pairs).T
        d, ks = ks_uniform(p)
        below = int((log10_p <= np.log10(0.05)).sum())
        row = {
            "network": name, "keys": keys, "ks_statistic": d, "ks_p": ks, "below_05": below / keys,
            "below_05_95": wilson_interval(below, keys), "claims_at_1e-6": int((log10_p <= -6).sum()),
            "smallest_log10_p": float(log10_p.min()), "first_key": FIRST_KEY, "version": __version__,
        }  # fmt: skip
        (RESULTS / f"{name}.json").write_text(json.dumps(row, indent=1) + "\n")
        print(
            f"{name}: KS p {ks:.3f}, below .05: {below / keys:.3f}, smallest log10 p {log10_p.min():.1f}",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--keys", type=int, default=1000)
    parser.add_argument("--work", type=Path, default=Path(__file__).parent / "work")
    parser.add_argument("--own", nargs="*", default=["control-0", "control-2", "scratch-0"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", nargs="*", default=["mnist", "cifar"])
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    third = {p.stem: p for p in sorted((SHARED / "networks").glob("*.pt2"))}
    grey = {n: open_suspect(p) for n, p in third.items() if "mnist" in n or "fashion" in n}
    if "mnist" in args.only:
        mnist = np.load(SHARED / "data" / "mnist.npz")
        pool = (
            torch.from_numpy(mnist["x_test"][:POOL, None]).float() / 255,
            torch.from_numpy(mnist["y_test"][:POOL]).long(),
        )
        family(ModelSpec("image", (1, 28, 28), 10, 0.0, 1.0, 255), grey, pool, args.keys)
    if "cifar" in args.only:
        x_test, y_test = load_cifar(args.work / "cifar.npz")[2:]
        colour = {n: open_suspect(p) for n, p in third.items() if n not in grey}
        for path in (args.work / f"{name}.ckpt" for name in args.own):
            if not path.exists():
                print(f"{path.name} isn't there: cifar10.py makes it", flush=True)
                continue
            colour[f"own-{path.stem}"] = ModuleSuspect(own(path))
        family(
            ModelSpec("image", (3, 32, 32), 10, 0.0, 1.0, 255),
            colour,
            (x_test[:POOL].float() / 255, y_test[:POOL]),
            args.keys,
        )


if __name__ == "__main__":
    main()
