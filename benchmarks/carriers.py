"""Which carrier for what: every scheme on digits beside one control, three seeds.

    python benchmarks/carriers.py            writes results/carriers.json, skips finished rows, prints the table

Settings are the digits task's, chosen on other keys. ``exported triggers`` are mixed into a plain training
that knows nothing of gradmark, each batch of 64 with 8 of them. Every other carrier goes in by the Marker.
"""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import stats
from torch import Tensor, nn

from gradmark import Marker, MarkFile, ModuleSuspect, OwnerKey, catalog, verify
from gradmark.bench.digits import experiment
from gradmark.bench.networks import DigitsNet
from gradmark.data import Data, Split, load_data
from gradmark.embed import accuracy_of, train
from gradmark.errors import GradmarkError
from gradmark.protocols import Thief
from gradmark.stats import mean_interval
from gradmark.triggers import triggers_of

RESULTS = Path(__file__).parent / "results" / "carriers.json"
SEEDS = (0, 1, 2)
KEYS = 41_000
PLAIN_TRIGGERS, PAIR = "exported triggers", "weights,class-contrast"
UNHIDDEN = "weights, preserve=0"
SCHEMES = ("weights", UNHIDDEN, "trigger", PLAIN_TRIGGERS, "margin-trigger", "probe-gradient", "gradsigns",
           "class-contrast", "filter-gradient", PAIR, "ensemble")  # fmt: skip
ATTACKS: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("fine-tuned", "finetune", {"epochs": 5}),
    ("permuted", "permute", {}),
    ("pruned 50 %", "prune", {"fraction": 0.5}),
)
LAYER = "6.weight"  # the one that ``weights`` takes by itself


def layer(model: nn.Module) -> np.ndarray:
    return dict(model.named_parameters())[LAYER].detach().flatten(1).numpy()


def distances(model: nn.Module, control: nn.Module) -> tuple[float, float]:
    """Kolmogorov-Smirnov distance of the layer's weights, and of its filters' mean, from the control's."""
    a, b = layer(model), layer(control)
    return (
        float(stats.ks_2samp(a.ravel(), b.ravel()).statistic),
        float(stats.ks_2samp(a.mean(0), b.mean(0)).statistic),
    )


def plain(name: str) -> str:
    return {PLAIN_TRIGGERS: "trigger", UNHIDDEN: "weights"}.get(name, name)


def mixed(data: Data, x: Tensor, labels: Tensor, seed: int) -> Split:
    """The training split with the triggers among it, one input in nine, as any data loader would have it."""
    split = data.to_train()
    times = max(1, round(len(split) / 8 / len(x)))
    inputs, targets = split.all()
    order = torch.randperm(len(inputs) + times * len(x), generator=torch.Generator().manual_seed(seed))
    inputs = torch.cat([inputs, x.repeat(times, *[1] * (x.ndim - 1))])[order]
    return Split(inputs, torch.cat([targets, labels.repeat(times)])[order], split.spec)


def row(
    name: str, seed: int, data: Data, control: nn.Module, sibling: nn.Module, base: float
) -> dict[str, Any]:
    digits = experiment()
    key, pool = OwnerKey.from_seed(KEYS + seed), data.test.all()
    marking = digits.marking_of(plain(name))
    given = {"preserve": 0.0} if name == UNHIDDEN else dict(marking.parameters)
    scheme = catalog.scheme(plain(name), given)
    if hasattr(scheme, "calibrated"):
        scheme = scheme.calibrated(key, data.spec, ModuleSuspect(control), pool)
    net, recipe = digits.untrained(seed), replace(digits.recipe, seed=seed)
    start = time.process_time()
    if name == PLAIN_TRIGGERS:
        export = triggers_of(scheme, key, data.spec)
        train(net, mixed(data, export.x, export.labels, seed), recipe)
    else:
        settings = dict(marking.marker) or {"carriers": 64, "every": 1, "budget": 0.5}
        marker = Marker(scheme, key, data.spec, seed=seed, **settings)
        train(net, data.to_train(), replace(recipe, **dict(marking.recipe)), marker=marker)
    seconds = time.process_time() - start
    mark = MarkFile.create(
        key, scheme.name, scheme.parameters(), data.spec, "signed-rank", 200, salt=bytes(16)
    )

    def log10_p(model: nn.Module, access: str) -> float | None:
        try:
            return round(verify(mark, key, ModuleSuspect(model), pool, access=access).log10_p, 2)  # type: ignore[arg-type]
        except GradmarkError:
            return None  # can't be read this way

    x, labels = data.to_train().all()
    third = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))[: len(x) // 3]
    thief = Thief(data.spec, x[third], labels[third], fresh=DigitsNet, lr=digits.means.lr)
    found: dict[str, Any] = {"white": log10_p(net, "white"), "black": log10_p(net, "black")}
    top1 = catalog.attack("output-top1").run(net, thief, torch.Generator().manual_seed(1))
    found["labels alone"] = log10_p(top1, "black")
    for label, attack, options in ATTACKS:
        stolen = catalog.attack(attack, options).run(net, thief, torch.Generator().manual_seed(1))
        white = log10_p(stolen, "white")
        found[label] = white
        found[f"{label}, accuracy"] = accuracy_of(stolen, data.test)[0] / len(data.test)
    found["control"] = log10_p(control, "white")
    ks, ks_mean = distances(net, control)
    return {
        "scheme": name, "seed": seed, "bits": len(scheme.mark(key, data.spec).bits), "log10_p": found,
        "accuracy": accuracy_of(net, data.test)[0] / len(data.test),
        "control": accuracy_of(control, data.test)[0] / len(data.test),
        "ks_weights": ks, "ks_filter_mean": ks_mean, "ks_sibling": distances(sibling, control),
        "seconds_ratio": seconds / base,
    }  # fmt: skip


def main() -> None:
    torch.set_num_threads(1)
    data, digits = load_data("digits"), experiment()
    rows = json.loads(RESULTS.read_text()) if RESULTS.exists() else []
    done = {(r["scheme"], r["seed"]) for r in rows}
    for seed in SEEDS:
        if all((name, seed) in done for name in SCHEMES):
            continue
        control, sibling = digits.untrained(seed), digits.untrained(seed + 1000)
        start = time.process_time()
        train(control, data.to_train(), replace(digits.recipe, seed=seed))
        base = time.process_time() - start
        train(sibling, data.to_train(), replace(digits.recipe, seed=seed + 1000))
        for name in SCHEMES:
            if (name, seed) not in done:
                rows.append(row(name, seed, data, control, sibling, base))
                print(rows[-1], flush=True)
                RESULTS.write_text(json.dumps(rows, indent=1) + "\n")
    print(table(rows))


def table(rows: list[dict[str, Any]]) -> str:
    """Medians over seeds of log10 p; the cost with its 95 % interval (Student's t)."""
    columns = ("white", "black", "labels alone", *(label for label, _, _ in ATTACKS))
    head = ["carrier", "bits", "accuracy given up, points", *columns, "KS weights", "KS filter means", "time"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for name in SCHEMES:
        mine = [r for r in rows if r["scheme"] == name]
        if not mine:
            continue
        cost = [100 * (r["control"] - r["accuracy"]) for r in mine]
        low, high = mean_interval(cost)
        cells = [name, str(mine[0]["bits"]), f"{np.mean(cost):.2f} [{low:.2f}, {high:.2f}]"]
        for column in columns:
            values = [r["log10_p"][column] for r in mine]
            cells.append("" if None in values else f"{np.median(values):.1f}")
        cells += [f"{np.mean([r[k] for r in mine]):.3f}" for k in ("ks_weights", "ks_filter_mean")]
        cells.append(f"{np.median([r['seconds_ratio'] for r in mine]):.2f}")
        lines.append("| " + " | ".join(cells) + " |")
    siblings = np.array([r["ks_sibling"] for r in rows if r["scheme"] == SCHEMES[0]])
    worst = max(abs(r["log10_p"]["control"] or 0) for r in rows)
    lines.append("")
    lines.append(
        f"Two unmarked networks of other seeds: KS {siblings[:, 0].mean():.3f} and {siblings[:, 1].mean():.3f}. "
        f"The controls' log10 p are 0 to {-worst:.1f}. {len({r['seed'] for r in rows})} seeds."
    )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
