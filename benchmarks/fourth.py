"""A part in the weights for networks that carry the default mark already, and the attack that it is for.

    gradmark bench benchmarks/suites/cifar10.toml --out BENCH --only none
    python benchmarks/fourth.py BENCH OUT --seeds 0 1 2

Each marked ResNet-20 of BENCH is trained for one epoch more, at two thirds of the rate that marked it, with
all four parts in the penalty; the first three stay the marks they were. Then `regularize` is run on it as
in the benchmark, and cells are written to OUT. Networks and cells that lie there are kept.
"""

from __future__ import annotations

import argparse
import json
import shutil
from dataclasses import replace
from pathlib import Path

from gradmark import catalog
from gradmark.bench.cells import finished, run_unit
from gradmark.bench.experiment import find_experiment
from gradmark.bench.run import one_thread
from gradmark.bench.store import Wanted, calibrated, obtain, owner_key
from gradmark.bench.suite import Entry, find_suite
from gradmark.embed import Marker, train
from gradmark.files import atomic_write
from gradmark.suspects import ModuleSuspect, save_weights
from gradmark.views import viewed

HERE = Path(__file__).parent
SUITE, RESULTS = HERE / "suites" / "cifar10-weights.toml", HERE / "results" / "fourth.json"
TASK, EPOCHS, RATE = "cifar10", 1, 0.1
ATTACKS = ("none", "permute", "flip-signs", "regularize")


def make(entry: Entry, seed: int, before: Path, out: Path) -> None:
    """Put the part into the network of ``seed`` that lies in ``before``; keep it and its mark in ``out``."""
    experiment, key = find_experiment(TASK), owner_key(seed)
    spec, path = experiment.data().spec, out / f"{Wanted(TASK, 'marked', seed, entry).name}.safetensors"
    if path.exists():
        return
    default = Entry(catalog.FLAGSHIP)
    model = obtain(Wanted(TASK, "marked", seed, default), before)
    control = ModuleSuspect(viewed(experiment.task, obtain(Wanted(TASK, "control", seed), before)))
    three = calibrated(default, experiment, seed, key, before)
    fourth = entry.scheme(TASK).parts[-1].calibrated(key, spec, control, experiment.carriers())
    scheme = replace(three, parts=(*three.parts, fourth))
    marking = entry.marking(TASK)
    recipe = replace(experiment.recipe, **marking.recipe, epochs=EPOCHS, lr=RATE, seed=seed + 200)
    marker = Marker(scheme, key, spec, seed=seed, **dict(marking.marker))
    train(model, experiment.data().to_train(), recipe, task=experiment.task, marker=marker, stage="fourth")
    atomic_write(path.with_suffix(".mark.json"), json.dumps(scheme.parameters()).encode(), overwrite=True)
    save_weights(model, path)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("bench", type=Path, help="folder of the benchmark, with marked networks")
    parser.add_argument("out", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    args = parser.parse_args()
    before, networks = args.bench / "networks", args.out / "networks"
    networks.mkdir(parents=True, exist_ok=True)
    units = [u for u in find_suite(str(SUITE)).units() if u.attack.label in ATTACKS and u.seed in args.seeds]
    for kind in ("base", "control", "sibling"):
        for path in before.glob(f"{TASK}-{kind}-*"):
            if not (networks / path.name).exists():
                shutil.copy(path, networks)
    with one_thread():
        for unit in sorted(units, key=lambda u: (u.seed, ATTACKS.index(u.attack.label))):
            make(unit.entry, unit.seed, before, networks)
            if not finished(unit, args.out):
                run_unit(unit, args.out)
    rows = [
        cell for path in sorted(args.out.glob("cells/*/*/*.json")) for cell in json.loads(path.read_text())
    ]
    RESULTS.write_text("[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n")
    for c in rows:
        print(
            f"seed {c['seed']}, {c['attack']}, {c['access']}: log10 p {c['log10_p']:.1f}, control "
            f"{c['utility_control']:.2f}, marked {c['utility_marked']:.2f}, loss {c['stealing_loss']:+.2f}"
        )


if __name__ == "__main__":
    main()
