"""Whose copy is it? Copies of one marked network, leaked, attacked and mixed: who is named, and is it ever an innocent?

    gradmark bench benchmarks/suites/digits.toml --out bench-out --only none     the marked networks
    python benchmarks/trace.py bench-out --seed 1 --seed 2                       measures; goes on where it stopped
    python benchmarks/trace.py --table                                           writes TRACE.md

Each cell is one suspect against 100,000 licensees, three or none of whom are involved. Ten *trials* go with each: the
same suspect against those involved and 1,000 names that occur nowhere else; whoever else is named is innocent.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gradmark import MarkFile, ModuleSuspect, OwnerKey, catalog, verify
from gradmark.bench.experiment import find_experiment
from gradmark.bench.store import owner_key
from gradmark.embed import Recipe, accuracy_of, train
from gradmark.files import atomic_write
from gradmark.protocols import Thief
from gradmark.suspects import load_weights, save_weights, weights_digest
from gradmark.trace import Tracing, copying, create, default_probes, open_tracing, rank

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "trace"
LICENSEES = tuple(f"licensee-{i:06d}" for i in range(100_000))
ALPHA, LOOSE = 1e-6, 0.05
TRIALS, NAMES = 10, 1000
RECIPE = Recipe(epochs=5, lr=1e-3, smoothing=0.1)
OPTIONS: dict[str, dict[str, Any]] = {"digits": {"step": 0.1}}
ATTACKS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("finetune", {}), ("prune", {"fraction": 0.5}), ("quantize", {"bits": 4}), ("distill", {"temperature": 4.0}),
)  # fmt: skip
State = dict[str, Tensor]


class Seed:
    """One owner: key, marked network, its tracing mark, three copies, and a thief."""

    def __init__(self, task: str, seed: int, out: Path) -> None:
        self.task, self.seed, self.out = find_experiment(task), seed, out
        self.data, self.key = self.task.data(), owner_key(seed)
        self.pool = self.data.test.batch(slice(0, self.task.pool))
        nets = out / "networks"
        self.base = self.load(nets / f"{task}-ensemble-{seed}.safetensors")
        parameters = json.loads((nets / f"{task}-ensemble-{seed}.mark.json").read_text())
        self.mark = self.marked(parameters)
        self.unmarked = self.load(nets / f"{task}-control-{seed}.safetensors")
        self.names = tuple(LICENSEES[(7919 * (10 * seed + j)) % len(LICENSEES)] for j in range(3))
        self.tracing_mark, self.tracing = self.traced(self.key, self.mark)
        self.signs: tuple[Tracing, np.ndarray] | None = None
        self.copies = [self.copied(name) for name in self.names]

    def load(self, path: Path) -> nn.Module:
        model = self.task.untrained(self.seed)
        load_weights(model, path)
        return model.eval()

    def marked(self, parameters: dict[str, Any]) -> MarkFile:
        return MarkFile.create(
            self.key, "ensemble", parameters, self.data.spec, "signed-rank", 200, salt=bytes(16)
        )

    def traced(self, key: OwnerKey, base: MarkFile) -> tuple[MarkFile, Tracing]:
        """The tracing mark of a key, kept in a file: its last digits are another machine's."""
        path = self.out / "trace" / f"{self.task.name}-{self.seed}-{key.key_id[7:15]}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            probes = default_probes(self.data.spec, OPTIONS.get(self.task.name))
            digest = weights_digest(self.base)
            create(base, key, probes, ModuleSuspect(self.base), self.pool, digest).save(path)
        mark = MarkFile.load(path)
        return mark, open_tracing(mark, key, base)

    def copied(self, name: str) -> nn.Module:
        """The licensee's copy: fine-tuned once, then read from its file."""
        path = self.out / "trace" / f"{self.task.name}-{self.seed}-{name}.safetensors"
        if path.exists():
            return self.load(path)
        model = copy.deepcopy(self.base)
        seed = int(name.rpartition("-")[2])
        start = time.process_time()
        rider = copying(self.tracing, name, self.base, seed=seed)
        recipe = replace(self.recipe(), seed=seed)
        train(model, self.data.to_train(), recipe, marker=rider, stage=name)
        save_weights(model, path)
        path.with_suffix(".txt").write_text(f"{time.process_time() - start:.1f}\n")
        return model.eval()

    def table(self, tracing: Tracing) -> np.ndarray:
        """Every licensee's bits; derived once, which ``codebook`` of the first cell tells the price of."""
        if self.signs is None or self.signs[0] is not tracing:
            self.signs = tracing, tracing.codebook.table(LICENSEES)
        return self.signs[1]

    def recipe(self) -> Recipe:
        if self.task.name == "digits":
            return RECIPE
        return replace(self.task.recipe, epochs=1, lr=self.task.recipe.lr / 5, smoothing=0.1)

    def thief(self) -> Thief:
        x, labels = self.data.to_train().all()
        third = torch.randperm(len(x), generator=torch.Generator().manual_seed(self.seed))[: len(x) // 3]
        means = self.task.means
        return Thief(
            self.data.spec, x[third], labels[third], fresh=partial(self.task.untrained, self.seed + 50),
            sibling=self.unmarked, lr=means.lr, optimizer=means.optimizer, batch_size=means.batch_size,
            augment=means.augmentation(), autocast=means.autocast,
        )  # fmt: skip

    def attacked(self, model: nn.Module, name: str, settings: dict[str, Any]) -> nn.Module:
        return catalog.attack(name, settings).run(
            model, self.thief(), torch.Generator().manual_seed(self.seed)
        )

    def mixed(self, models: list[nn.Module], how: Callable[[list[Tensor], str], Tensor]) -> nn.Module:
        """A network whose every tensor is made from the copies' by ``how``(tensors, name)."""
        made = copy.deepcopy(models[0])
        states = [m.state_dict() for m in models]
        made.load_state_dict({name: how([s[name] for s in states], name) for name in states[0]})
        return made.eval()


def mean(tensors: list[Tensor], _: str) -> Tensor:
    return torch.stack(tensors).mean(0) if tensors[0].is_floating_point() else tensors[0]


def beyond(tensors: list[Tensor], _: str) -> Tensor:
    """Twice the first less the second: past the first copy, away from the second."""
    return 2 * tensors[0] - tensors[1] if tensors[0].is_floating_point() else tensors[0]


def by_layer(tensors: list[Tensor], name: str) -> Tensor:
    """Whole layers in turn: a layer and the norm behind it (a norm's own index follows its layer's)."""
    numbers = [int(part) for part in name.split(".") if part.isdigit()]
    return tensors[(numbers[0] // 3 if numbers else 0) % len(tensors)]


def by_weight(tensors: list[Tensor], name: str) -> Tensor:
    """Every single weight from one of the copies, by the toss of a coin."""
    generator = torch.Generator().manual_seed(len(name) + tensors[0].numel())
    pick = torch.randint(len(tensors), tensors[0].shape, generator=generator)
    return torch.stack(tensors).gather(0, pick[None])[0]


def extremes(tensors: list[Tensor], _: str) -> Tensor:
    """The midpoint of the least and the greatest of the copies' weights."""
    if not tensors[0].is_floating_point():
        return tensors[0]
    stacked = torch.stack(tensors)
    return (stacked.amin(0) + stacked.amax(0)) / 2


def suspects(s: Seed) -> dict[str, tuple[tuple[int, ...], Callable[[], nn.Module]]]:
    """Name to which of the three licensees are involved, and how it is made."""
    a, b, c = s.copies
    two, three = [a, b], [a, b, c]
    made: dict[str, tuple[tuple[int, ...], Callable[[], nn.Module]]] = {
        "copy": ((0,), lambda: a),
        "copy 2": ((1,), lambda: b),
        "copy 3": ((2,), lambda: c),
        "average of 2": ((0, 1), lambda: s.mixed(two, mean)),
        "average of 3": ((0, 1, 2), lambda: s.mixed(three, mean)),
        "layers of 2": ((0, 1), lambda: s.mixed(two, by_layer)),
        "layers of 3": ((0, 1, 2), lambda: s.mixed(three, by_layer)),
        "single weights of 2": ((0, 1), lambda: s.mixed(two, by_weight)),
        "single weights of 3": ((0, 1, 2), lambda: s.mixed(three, by_weight)),
        "midrange of 3": ((0, 1, 2), lambda: s.mixed(three, extremes)),
        "first, away from second": ((0, 1), lambda: s.mixed(two, beyond)),
        "average of 2, quantize": ((0, 1), lambda: s.attacked(s.mixed(two, mean), "quantize", {"bits": 4})),
        "marked, no copy": ((), lambda: s.base),
        "unmarked": ((), lambda: s.unmarked),
        "untrained": ((), lambda: s.task.untrained(s.seed + 99).eval()),
    }
    for name, settings in ATTACKS:
        made[f"copy, {name}"] = ((0,), partial(s.attacked, a, name, settings))
    made["average of 2, finetune"] = ((0, 1), lambda: s.attacked(s.mixed(two, mean), "finetune", {}))
    made["average of 3, finetune"] = ((0, 1, 2), lambda: s.attacked(s.mixed(three, mean), "finetune", {}))
    return made


def cell(
    s: Seed, name: str, involved: tuple[int, ...], model: nn.Module, access: str, tracing: Tracing
) -> dict[str, Any]:
    """One suspect against all licensees, and ten trials against others."""
    clock = [time.process_time()]
    wall = time.perf_counter()
    suspect = ModuleSuspect(model)
    reading = tracing.probes.read(
        tracing.mark,
        suspect,
        s.pool,
        access=access,
        carriers=s.tracing_mark.carriers,
        queries=1000 if access == "black" else 0,
    )
    clock.append(time.process_time())
    signs = s.table(tracing)
    clock.append(time.process_time())
    values = reading.values.numpy()
    ranking = rank(values, signs, test="sign-flip", alpha=ALPHA, parts=reading.parts)
    clock.append(time.process_time())
    guilty = [LICENSEES.index(s.names[i]) for i in involved]
    own = {f.index: f for f in ranking.found}
    innocents = np.delete(ranking.log10_p, guilty)
    owned = verify(s.mark, s.key, suspect, s.pool, access=access)
    right, n = accuracy_of(model, s.data.test)
    trials = trial(s, name, tracing, signs[guilty], values, reading.parts)
    return {
        "task": s.task.name, "seed": s.seed, "suspect": name, "access": access, "involved": len(involved),
        "named": sum(i in own for i in guilty), "innocents_named": len([i for i in own if i not in guilty]),
        "innocents": len(innocents), "least_innocent_log10_p": float(innocents.min()),
        "log10_p": [round(float(ranking.log10_p[i]), 3) for i in guilty],
        "rounds": [own[i].round if i in own else None for i in guilty],
        "base_log10_p": round(owned.log10_p, 3), "accuracy": right / n, "accuracy_n": n,
        "queries": reading.queries, "bits": len(values), "trials": trials,
        "cpu_seconds": dict(zip(("reading", "codebook", "ranking"), np.round(np.diff(clock), 3).tolist(), strict=True)),
        "wall_seconds": round(time.perf_counter() - wall, 3), "load": os.getloadavg()[0],
    }  # fmt: skip


def trial(
    s: Seed, name: str, tracing: Tracing, guilty: np.ndarray, values: np.ndarray, parts: tuple[int, ...]
) -> dict[str, int]:
    """In how many of ten lists of 1,000 fresh names an innocent was named, at both levels."""
    found = {"n": TRIALS, "named_1e-6": 0, "named_0.05": 0}
    for t in range(TRIALS):
        fresh = tracing.codebook.table([f"{s.seed}/{name}/{t}/{i}" for i in range(NAMES)])
        signs = np.concatenate([guilty, fresh])
        for label, alpha in (("named_1e-6", ALPHA), ("named_0.05", LOOSE)):
            ranking = rank(values, signs, test="sign-flip", alpha=alpha, parts=parts)
            found[label] += any(f.index >= len(guilty) for f in ranking.found)
    return found


def measure(task: str, seed: int, out: Path) -> None:
    place = RESULTS / f"{task}-{seed}.json"
    cells = json.loads(place.read_text()) if place.exists() else []
    done = {(c["suspect"], c["access"]) for c in cells}
    s = Seed(task, seed, out)
    right, n = accuracy_of(s.base, s.data.test)
    for name, (involved, make) in suspects(s).items():
        accesses = ["white"] if name not in ("copy", "average of 2", "unmarked") else ["white", "black"]
        todo = [a for a in accesses if (name, a) not in done]
        model = make() if todo else None
        for access in todo:
            cells.append(cell(s, name, involved, model, access, s.tracing) | {"base_accuracy": right / n})
            save(place, cells)
    if ("copy, another owner's key", "white") not in done:
        other = OwnerKey.from_seed(seed + 5000, "another owner")
        base = MarkFile.create(other, "ensemble", dict(s.mark.scheme_parameters), s.data.spec, "signed-rank", 200, salt=bytes(16))  # fmt: skip
        strange = s.traced(other, base)[1]
        row = cell(s, "copy, another owner's key", (), s.copies[0], "white", strange)
        cells.append(row | {"base_accuracy": right / n})
        save(place, cells)


def save(place: Path, cells: list[dict[str, Any]]) -> None:
    place.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(place, (json.dumps(cells, indent=1) + "\n").encode(), overwrite=True)
    row = cells[-1]
    print(row["seed"], row["suspect"], row["access"], row["log10_p"], row["named"], row["innocents_named"],
          round(100 * row["accuracy"], 2), row["base_log10_p"], row["trials"], row["cpu_seconds"], flush=True)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, nargs="?", default=Path("bench-out"))
    parser.add_argument("--task", default="digits")
    parser.add_argument("--seed", type=int, action="append", default=[])
    parser.add_argument("--table", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    for seed in args.seed or ([] if args.table else range(1, 6)):
        measure(args.task, seed, args.out)
    if args.table:
        from trace_table import write

        write(RESULTS, HERE / "TRACE.md")


if __name__ == "__main__":
    main()
