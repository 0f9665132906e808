"""Keys that were never embedded, on a marked network: are their p-values uniform?

gradmark bench benchmarks/suites/digits.toml --out bench-out --seed 1 --only none
python benchmarks/strangers.py bench-out [--keys 700]
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from scipy.stats import kstest

from gradmark import ModuleSuspect, OwnerKey, catalog
from gradmark.bench.experiment import find_experiment
from gradmark.stats import run_tests
from gradmark.suspects import load_weights

FIRST = 990_000  # of keys that nothing else uses


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("--keys", type=int, default=700)
    args = parser.parse_args()
    torch.set_num_threads(1)
    task = find_experiment("digits")
    data, nets = task.data(), {}
    for kind in ("ensemble", "control"):
        net = task.untrained(0)
        load_weights(net, args.out / "networks" / f"digits-{kind}-1.safetensors")
        nets[kind] = ModuleSuspect(net.eval())
    pool, found = data.test.all(), {"white": [], "black": []}
    for i in range(args.keys):
        key = OwnerKey.from_seed(FIRST + i)
        scheme = catalog.scheme("ensemble", dict(task.marking_of("ensemble").parameters))
        scheme = scheme.calibrated(key, data.spec, nets["control"], pool)
        mark = scheme.mark(key, data.spec)
        for access, values in found.items():
            reading = scheme.read(mark, nets["ensemble"], pool, access=access, carriers=200, queries=2000)
            signed = (reading.values * reading.bits).numpy()
            values.append(10 ** run_tests("signed-rank", signed, reading.parts).log10_p)
    rows = [
        {"access": access, "keys": len(p), "share <= .05": sum(v <= 0.05 for v in p) / len(p),
         "share <= .01": sum(v <= 0.01 for v in p) / len(p), "least": min(p), "KS p": float(kstest(p, "uniform").pvalue)}
        for access, p in found.items()
    ]  # fmt: skip
    print(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
