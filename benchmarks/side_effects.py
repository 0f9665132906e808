"""What marks harm beside accuracy: the benchmark's networks against their controls, seed by seed.

    gradmark bench benchmarks/suites/digits.toml --out bench-out
    python benchmarks/side_effects.py bench-out benchmarks/suites/digits.toml ...

Differences in points, their means over seeds and 95 % intervals of these, by task and scheme; of corruptions also what a
scheme costs more than the default, in pairs of one seed. Writes results/side_effects.json, where what isn't in the folder
keeps its rows, and prints the table.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from statistics import mean

import torch

from gradmark.audit.effects import Effect, side_effects
from gradmark.bench.experiment import find_experiment
from gradmark.bench.run import one_thread
from gradmark.bench.store import Wanted, obtain
from gradmark.bench.suite import find_suite
from gradmark.catalog import FLAGSHIP
from gradmark.files import atomic_write
from gradmark.suspects import ModuleSuspect
from robustness import mean_told

PATH = Path(__file__).parent / "results" / "side_effects.json"
PLAIN = ("accuracy", "calibration error (ECE)", "PGD, radius 0.03")
SPOILT = "all corruptions"
MOST = 2000  # test inputs
Rows = dict[str, dict[str, dict[str, dict[str, float]]]]  # task, scheme, seed, measure


def differences(wanted: Wanted, folder: Path) -> dict[str, float]:
    """Marked minus control, in points, of what :func:`side_effects` measures."""
    experiment = find_experiment(wanted.task)
    data = experiment.data()
    x, labels = data.test.all()
    pair = wanted, Wanted(wanted.task, "control", wanted.seed)
    model, control = (ModuleSuspect(obtain(one, folder)) for one in pair)
    effects, _ = side_effects(
        model, control, (x[:MOST], labels[:MOST]), data.spec, torch.Generator().manual_seed(0)
    )
    rows = {e.name: _points([e]) for e in effects if e.name in PLAIN}
    spoilt = [e for e in effects if e.kind == "corruption"]
    for kind in dict.fromkeys(e.name.rsplit(" ", 1)[0] for e in spoilt):
        rows[kind] = _points([e for e in spoilt if e.name.rsplit(" ", 1)[0] == kind])
    return {**rows, SPOILT: _points(spoilt)}


def _points(effects: list[Effect]) -> float:
    return round(100 * mean(e.model - e.control for e in effects), 3)


def table(rows: Rows) -> Iterator[str]:
    for task, schemes in rows.items():
        measures = list(next(iter(next(iter(schemes.values())).values())))
        heads = "scheme", "seeds", *measures, f"{SPOILT}, beside {FLAGSHIP}"
        yield f"\n### {task}\n\n| " + " | ".join(heads) + " |"
        yield "|" + "---|" * len(heads)
        plain = schemes.get(FLAGSHIP, {})
        for scheme, seeds in schemes.items():
            said = [mean_told([row[m] for row in seeds.values()]) for m in measures]
            more = [row[SPOILT] - plain[s][SPOILT] for s, row in seeds.items() if s in plain]
            said.append(mean_told(more) if more else "")
            yield f"| {scheme} | {len(seeds)} | " + " | ".join(said) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, help="what `gradmark bench` wrote")
    parser.add_argument("suites", nargs="+")
    given = parser.parse_args()
    folder = given.out / "networks"
    rows: Rows = json.loads(PATH.read_text()) if PATH.exists() else {}
    for suite in map(find_suite, given.suites):
        entries = {e.shown: e for e in suite.schemes}
        for task, entry, seed in dict.fromkeys((u.task, u.entry.shown, u.seed) for u in suite.units()):
            wanted = Wanted(task, "marked", seed, entries[entry])
            if not (folder / f"{wanted.name}.safetensors").exists():
                continue
            with one_thread():
                found = differences(wanted, folder)
            rows.setdefault(task, {}).setdefault(entry, {})[str(seed)] = found
            print(task, entry, seed, found, flush=True)
    atomic_write(PATH, (json.dumps(rows, indent=1, sort_keys=True) + "\n").encode(), overwrite=True)
    print("\n".join(table(rows)))


if __name__ == "__main__":
    main()
