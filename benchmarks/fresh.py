"""What a thief could have had without stealing: the owner's own recipe, on the third of the data that he has.

    python benchmarks/fresh.py [TASK ...]    digits, speech and cifar10; resumes

Where a network trained so is as good as what an attack leaves, the attack took nothing from the owner. Writes
results/robustness/fresh.json, which `robustness.py` puts beside the cells that fall short.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from gradmark.bench.cells import thiefs_rows
from gradmark.bench.experiment import find_experiment
from gradmark.bench.run import one_thread
from gradmark.bench.suite import find_suite
from gradmark.data import Split
from gradmark.embed import train
from gradmark.files import atomic_write

HERE = Path(__file__).parent
PATH = HERE / "results" / "robustness" / "fresh.json"
SUITES = {
    "digits": ["digits"],
    "speech": ["speech"],
    "cifar10": ["cifar10", "cifar10-fourth"],
}  # for their seeds


def utility(task: str, seed: int) -> float:
    """Of a network from other first weights than the owner's, in percent."""
    experiment = find_experiment(task)
    data = experiment.data().to_train()
    index, _ = thiefs_rows(experiment, seed)
    part = Split(data.x[index], data.y[index], data.spec)
    model = experiment.untrained(seed + 5000)
    if experiment.pretrain is not None:
        train(model, part, experiment.seeded(experiment.pretrain, seed + 5000), task=experiment.task)
    train(model, part, experiment.seeded(experiment.recipe, seed + 5100), task=experiment.task)
    return experiment.task.utility(model).percent


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("tasks", nargs="*", default=list(SUITES))
    found = json.loads(PATH.read_text()) if PATH.exists() else {}
    for task in parser.parse_args().tasks:
        done = found.setdefault(task, {})
        suites = [find_suite(str(HERE / "suites" / f"{name}.toml")) for name in SUITES[task]]
        for seed in sorted({seed for suite in suites for seed in suite.seeds}):
            if str(seed) in done:
                continue
            with one_thread():
                done[str(seed)] = round(utility(task, seed), 3)
            atomic_write(PATH, (json.dumps(found, indent=1, sort_keys=True) + "\n").encode(), overwrite=True)
            print(task, seed, done[str(seed)], flush=True)


if __name__ == "__main__":
    main()
