"""Keys that were never embedded, on marked networks, attacked or not: are their p-values uniform?

    gradmark bench benchmarks/suites/strangers.toml --out bench-strangers
    gradmark bench benchmarks/suites/cifar10-strangers.toml --out bench-cifar10-strangers
    gradmark bench benchmarks/suites/strangers-paths.toml --out bench-strangers-paths
    gradmark bench benchmarks/suites/strangers-features.toml --out bench-strangers-features
    gradmark bench benchmarks/suites/strangers-rehearsed.toml --out bench-strangers-rehearsed
    gradmark bench benchmarks/suites/strangers-hardened.toml --out bench-strangers-hardened
    gradmark bench benchmarks/suites/strangers-whole.toml --out bench-strangers-whole
    gradmark bench benchmarks/suites/strangers-keyed.toml --out bench-strangers-keyed
    python benchmarks/strangers.py bench-strangers* bench-cifar10-strangers

Every key's reference comes from the same unmarked control, and its bits are drawn afterwards. Writes
results/strangers.json, where rows of tasks and schemes that aren't given stay, and prints it as a table. Within a row keys are independent; the rows share their keys.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import binomtest, kstest

RESULTS = Path(__file__).parent / "results" / "strangers.json"


def row(cell: dict[str, Any]) -> dict[str, Any]:
    p = 10 ** np.array(cell["wrong_key_log10_p"])
    low = binomtest(int((p <= 0.05).sum()), len(p)).proportion_ci()
    return {
        "task": cell["task"], "scheme": cell["scheme"], "attack": cell["attack"], "access": cell["access"], "keys": len(p),
        "share <= .05": float((p <= 0.05).mean()), "interval": [round(low.low, 3), round(low.high, 3)],
        "share <= .01": float((p <= 0.01).mean()), "least log10 p": round(float(np.log10(p.min())), 2),
        "KS p": round(float(kstest(p, "uniform").pvalue), 3), "own key, log10 p": round(cell["log10_p"], 1),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", nargs="*", type=Path, help="folders of gradmark bench; none: the known rows")
    args = parser.parse_args()
    if args.out:
        paths = [path for out in args.out for path in sorted((out / "cells").glob("*/*/*.json"))]
        rows = [row(cell) for path in paths for cell in json.loads(path.read_text())]
        made = {(one["task"], one["scheme"]) for one in rows}
        known = json.loads(RESULTS.read_text())
        rows = [one for one in known if (one["task"], one["scheme"]) not in made] + rows
        RESULTS.write_text(json.dumps(rows, indent=1) + "\n")
    rows = json.loads(RESULTS.read_text())
    print("| " + " | ".join(rows[0]) + " |\n|" + "---|" * len(rows[0]))
    for one in rows:
        print("| " + " | ".join(str(v) for v in one.values()) + " |")


if __name__ == "__main__":
    main()
