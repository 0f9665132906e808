"""What more natural inputs buy after an attack: a larger pool, more carriers, more queries.

    python benchmarks/more_queries.py bench-out benchmarks/suites/cifar10-keyed.toml regularize output-match-linear+distill-sibling

`gradmark bench` reads every network alike: 200 carriers or 2,000 queries out of at most 2,000 inputs that no training saw. An
owner who has more of them may use more; how many is settled before he asks. Attacks each network of the suite again, as
the benchmark did, and reads what is left with pools up to the whole test set: with the weights by a tenth as many carriers,
through the API by as many queries as there are inputs, and twice as many. Writes results/more_queries.json, where networks and
attacks that aren't asked for keep their rows, and prints the table.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from torch import nn

from gradmark.bench.cells import TEST, attacked_by, networks_of
from gradmark.bench.experiment import Experiment, find_experiment
from gradmark.bench.run import one_thread
from gradmark.bench.store import about, calibrated, obtain, owner_key
from gradmark.bench.suite import Unit, find_suite
from gradmark.codec import MarkFile
from gradmark.files import atomic_write
from gradmark.protocols import Access
from gradmark.suspects import ModuleSuspect
from gradmark.verify import verify
from gradmark.views import priced, unviewed

PATH = Path(__file__).parent / "results" / "more_queries.json"
INPUTS = (1000, 2000, 4000, 8000, 10000)
FEWER = 10  # times as few carriers as inputs: what gradients are taken at
Row = dict[str, Any]


def readings(unit: Unit, experiment: Experiment, model: nn.Module, folder: Path) -> list[Row]:
    """The owner's log10 p by pool, access and budget."""
    key, data = owner_key(unit.seed), experiment.data()
    scheme = calibrated(unit.entry, unit.task, unit.seed, key, folder)
    suspect = priced(experiment.task, ModuleSuspect(model))
    rows: list[Row] = []
    for n in sorted({min(n, len(data.test)) for n in INPUTS}):
        pool = experiment.task.carriers(data.test.batch(slice(0, n)))
        ways: list[tuple[Access, int]] = [("white", 0), ("black", n), ("black", 2 * n)]
        for access, queries in ways:
            mark = MarkFile.create(
                key, scheme.name, scheme.parameters(), data.spec, TEST, n // FEWER, salt=bytes(16)
            )
            found = verify(mark, key, suspect, pool, access=access, queries=queries)
            rows.append(
                {"inputs": n, "access": access, "queries": queries, "log10_p": round(found.log10_p, 2)}
            )
    return rows


def measured(unit: Unit, out: Path) -> Row:
    """Attack the unit's network as the benchmark does, and read it."""
    experiment, folder, wanted = find_experiment(unit.task), out / "networks", networks_of(unit)["marked"]
    attacked = attacked_by(unit, experiment, obtain(wanted, folder), folder)
    given_up = about(wanted, folder)["utility"] - experiment.task.utility(unviewed(attacked)).percent
    return {
        "task": unit.task, "scheme": unit.entry.shown, "seed": unit.seed, "attack": unit.attack.label,
        "stealing_loss": round(given_up, 2), "readings": readings(unit, experiment, attacked, folder),
    }  # fmt: skip


def same(a: Row, b: Row) -> bool:
    return all(a[k] == b[k] for k in ("task", "scheme", "seed", "attack"))


def told(rows: list[Row]) -> str:
    """One row for every network and attack, one column for every number of inputs."""
    counts = sorted({one["inputs"] for row in rows for one in row["readings"]})
    heads = ["task", "mark", "seed", "attack", "points", *(f"{n:,} inputs" for n in counts)]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for row in rows:
        cells = []
        for n in counts:
            own = [one["log10_p"] for one in row["readings"] if one["inputs"] == n]
            cells.append(" / ".join(f"{p:.1f}" for p in own))
        names = (str(row[k]) for k in ("task", "scheme", "seed", "attack"))
        lines.append("| " + " | ".join([*names, f"{row['stealing_loss']:.1f}", *cells]) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, help="a folder of `gradmark bench`")
    parser.add_argument("suite", help="of the networks there")
    parser.add_argument("attacks", nargs="+", metavar="ATTACK")
    parser.add_argument("--seed", type=int, help="only the network of this seed")
    given = parser.parse_args()
    rows: list[Row] = json.loads(PATH.read_text()) if PATH.exists() else []
    for unit in find_suite(given.suite).units():
        if unit.attack.label not in given.attacks or given.seed not in (None, unit.seed):
            continue
        found = measured(unit, given.out)
        rows = [row for row in rows if not same(row, found)] + [found]
        rows.sort(key=lambda row: [str(row[k]) for k in ("task", "scheme", "attack", "seed")])
        atomic_write(PATH, (json.dumps(rows, indent=1) + "\n").encode(), overwrite=True)
    print(told(rows))


if __name__ == "__main__":
    one_thread()
    main()
