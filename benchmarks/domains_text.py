"""Speech recognition and text: fidelity, evidence, strangers' keys and attacks, for DOMAINS_TEXT.md.

    python benchmarks/domains_text.py [--domain language] [--seeds 0 1 2] [--out benchmarks/work/text]
    python benchmarks/domains_text.py --table

For each seed a base network is trained without a mark, from which two are tuned on one schedule and the same
batches: the control, and one with two marks under one key. Networks are kept in ``--out`` and results in
``results/domains_text``, and what is there is not made again: a run that was killed goes on. Settings were
chosen with keys of 900 and above, and on the CTC network of another size; the keys here are those of the seeds.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from gradmark import Marker, MarkFile, OwnerKey, catalog, verify
from gradmark.errors import GradmarkError
from gradmark.files import atomic_write
from gradmark.protocols import Batch, Task, Thief
from gradmark.stats import ks_uniform, mean_interval, randomised_p
from gradmark.suspects import ModuleSuspect
from gradmark.tasks.language import Language
from gradmark.tasks.sentences import Sentences
from gradmark.tasks.transcription import Transcription
from gradmark.views import View, unviewed

HERE = Path(__file__).parent
RESULTS, TABLE = HERE / "results" / "domains_text", HERE / "DOMAINS_TEXT.md"
SEEDS, WRONG = (0, 1, 2), 200
CARRIERS, QUERIES = 200, 2000


@dataclass(frozen=True)
class Part:
    """One mark: its scheme, parameters, the Marker's arguments and what it is read through."""

    scheme: str
    parameters: dict[str, Any]
    marker: dict[str, Any]
    view: Callable[[Any, nn.Module], Task]
    access: tuple[str, ...]


@dataclass(frozen=True)
class Domain:
    """``steps``, ``tuning``: numbers of steps of the base and of control and marked network; ``lr``, ``rate``:
    their greatest learning rates. ``headline``: of the utility's details, or accuracy. ``rest``: the share of
    the tuning, at its end, in which the marks are left alone: the task comes back, most of the marks stays."""

    task: Callable[[], Any]
    parts: dict[str, Part]
    steps: int
    tuning: int
    batch: int
    lr: float = 3e-3
    rate: float = 1e-3
    headline: str = "accuracy"
    rest: float = 0.0
    attacks: dict[str, tuple[str, dict[str, Any]]] = field(default_factory=dict)
    thief: int = 1000


WEIGHTS: dict[str, tuple[str, dict[str, Any]]] = {
    "pruned, 30 % of the weights": ("prune", {"fraction": 0.3}),
    "int8, per tensor": ("quantize", {}),
    "int8 weight-only (torchao)": ("torchao-int8", {}),
    "averaged with the control": ("average", {}),
}
TUNED: dict[str, tuple[str, dict[str, Any]]] = {
    "fine-tuned": ("finetune", {"epochs": 2}),
    "LoRA": ("lora", {"epochs": 2}),
}
DOMAINS = {
    "transcription": Domain(
        Transcription,
        {
            "frames": Part(
                "filter-gradient", {"bits": 64, "step": 0.1}, {"strength": 0.4, "every": 1, "carriers": 8},
                lambda task, base: task, ("white", "black"),
            ),
            "confidence": Part(
                "filter-gradient", {"bits": 24, "step": 0.1}, {"strength": 0.4, "every": 1, "carriers": 8},
                lambda task, base: Transcription("confidence"), ("white", "black"),
            ),
        },
        steps=300, tuning=150, batch=16, lr=5e-3, headline="word_error_rate",
        attacks={**TUNED, **WEIGHTS}, thief=500,
    ),
    "sentences": Domain(
        Sentences,
        {
            "embeddings": Part(
                "filter-gradient", {"bits": 64, "step": 0.3}, {"strength": 0.6, "every": 1, "carriers": 48},
                lambda task, base: task.embedded(base), ("white",),
            ),
            "words": Part(
                "filter-gradient", {"bits": 64}, {"strength": 0.15, "every": 1, "carriers": 32},
                lambda task, base: task, ("white", "black"),
            ),
        },
        steps=350, tuning=150, batch=48, lr=1.5e-3, rate=5e-4, attacks={**TUNED, **WEIGHTS}, thief=2000,
    ),
    "language": Domain(
        Language,
        {
            "embeddings": Part(
                "filter-gradient", {"bits": 64, "step": 0.2},
                {"strength": 0.3, "every": 1, "carriers": 16, "margin": 0.3},
                lambda task, base: task.embedded(base), ("white",),
            ),
            "tokens": Part(
                "class-contrast", {"bits": 128},
                {"strength": 0.2, "every": 1, "carriers": 16, "margin": 0.3},
                lambda task, base: task, ("white", "black"),
            ),
        },
        steps=500, tuning=220, rest=0.4, batch=16, lr=4e-3, headline="perplexity",
        attacks={**TUNED, **WEIGHTS, "probabilities of 2 decimals": ("output-round", {}),
                 "the 5 likeliest tokens alone": ("output-topk", {"k": 5})},
        thief=1500,
    ),
}  # fmt: skip


def batches(task: Any, n: int, generator: torch.Generator) -> Batch:
    """The next batch of training: fresh strings of speech, or a draw from the training split."""
    if hasattr(task, "fresh"):
        found: Batch = task.fresh(n, generator)
        return found
    train = task.data().to_train()
    return train.batch(torch.randint(len(train), (n,), generator=generator))  # type: ignore[no-any-return]


def fit(
    model: nn.Module, task: Any, steps: int, batch: int, lr: float, seed: int,
    markers: tuple[tuple[Marker, Task], ...] = (), rest: float = 0.0,
) -> nn.Module:  # fmt: skip
    """AdamW, a short rise and a cosine. Each marker adds one line to the loss."""
    optimizer = torch.optim.AdamW(model.parameters(), lr, weight_decay=1e-2)
    generator = torch.Generator().manual_seed(seed)
    views = [(marker, View(its, model)) for marker, its in markers]
    model.train()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # dropout
        for step in range(steps):
            for group in optimizer.param_groups:
                rise, fall = min(1.0, (step + 1) / 30), 0.5 * (1 + math.cos(math.pi * step / steps))
                group["lr"] = lr * rise * fall
            given = batches(task, batch, generator)
            loss = task.loss(model, given)
            marking = step < (1 - rest) * steps
            for marker, view in views if marking else ():
                # It draws nothing from the global state: both networks drop the same units.
                loss = loss + marker.penalty(view, given)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 5.0)
            optimizer.step()
    return model.eval()


def network(name: str, seed: int, kind: str, out: Path, make: Callable[[], nn.Module]) -> nn.Module:
    """The network from its file, or made and kept."""
    path = out / f"{name}-{seed}-{kind}.safetensors"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: nn.Module = DOMAINS[name].task().network()
    if path.exists():
        model.load_state_dict(load_file(path))
        return model.eval()
    start = time.process_time()
    model = make()
    out.mkdir(parents=True, exist_ok=True)
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, path)
    print(f"{path.name}: {time.process_time() - start:.0f} s of processor time", flush=True)
    return model


def carriers_of(task: Any, split: str, n: int = 2000) -> Batch:
    data = task.data()
    rows = data.test if split == "test" else data.to_train()
    batch = rows.batch(slice(0, n))
    x, labels = task.carriers(batch)
    if len(x) > 4 * n:  # the beginnings of windows: every n-th window's are enough to choose from
        keep = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))[: 4 * n]
        x, labels = x[keep], labels[keep]
    return x, labels


def scheme_of(part: Part, key: OwnerKey, view: Any, base: nn.Module | None) -> Any:
    """The scheme, calibrated on the base network and training inputs where there is one."""
    scheme: Any = catalog.scheme(part.scheme, dict(part.parameters))
    if base is None:
        return scheme
    pool = carriers_of(view, "train")
    return scheme.calibrated(key, view.data().spec, ModuleSuspect(View(view, base)), pool)


def judged(
    part: Part, scheme: Any, key: OwnerKey, view: Any, model: nn.Module, access: Any, guarded: bool = False
) -> Any:
    """``guarded``: the model gives scores already, behind something that changes them."""
    mark = MarkFile.create(key, scheme.name, scheme.parameters(), view.data().spec, "signed-rank", CARRIERS)
    suspect = ModuleSuspect(model if guarded else View(view, model))
    return verify(mark, key, suspect, carriers_of(view, "test"), access=access, queries=QUERIES)


def small(verdict: Any) -> dict[str, Any]:
    found = verdict.to_json()
    names = ("outcome", "log10_p", "n_bits", "n_match", "queries")
    size = float(verdict.reading.values.abs().mean())
    return {**{n: found[n] for n in names}, "size": round(size, 4)}


def strangers(part: Part, view: Any, model: nn.Module, access: Any) -> dict[str, Any]:
    """p-values of keys that were never embedded, with an eighth of the carriers."""
    pool, suspect = carriers_of(view, "test"), ModuleSuspect(View(view, model))
    draw, found = np.random.default_rng(0), []
    for i in range(WRONG):
        key = OwnerKey.from_seed(50_000 + i, "a stranger")
        scheme: Any = scheme_of(part, key, view, None)
        reading = scheme.read(
            scheme.mark(key, view.data().spec), suspect, pool, access=access, carriers=CARRIERS // 8,
            queries=QUERIES // 8,
        )  # fmt: skip
        found.append(randomised_p("signed-rank", (reading.values * reading.bits).numpy(), draw))
    at = {f"share_{p}": float(np.mean(np.array(found) <= p)) for p in (0.01, 0.05)}
    return {"keys": WRONG, **at, "least": min(found), "ks_p": ks_uniform(found)[1]}


def headline(domain: Domain, task: Any, model: nn.Module) -> float:
    found = task.utility(model)
    return float(found.details.get(domain.headline, found.percent))


def thief_of(domain: Domain, task: Any, control: nn.Module, seed: int) -> Thief:
    """Inputs of the training split, its targets, and the unmarked network."""
    x, y = task.data().to_train().batch(slice(0, domain.thief))
    return Thief(
        task.data().spec, x, y, sibling=View(task, control), lr=domain.rate, optimizer="adamw",
        batch_size=domain.batch,
    )  # fmt: skip


def run(name: str, seed: int, out: Path, attacks: bool) -> dict[str, Any]:
    """All numbers of one domain and seed."""
    domain, key = DOMAINS[name], OwnerKey.from_seed(seed, "the owner")
    task = domain.task()

    def fresh() -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return task.network()

    base = network(
        name, seed, "base", out, lambda: fit(fresh(), task, domain.steps, domain.batch, domain.lr, seed)
    )
    views = {part: its.view(task, base) for part, its in domain.parts.items()}
    schemes = {p: scheme_of(its, key, views[p], base) for p, its in domain.parts.items()}

    def tuned(marked: bool) -> nn.Module:
        markers = tuple(
            (Marker(schemes[p], key, views[p].data().spec, seed=seed, **its.marker), views[p])
            for p, its in domain.parts.items() if marked
        )  # fmt: skip
        return fit(
            copy.deepcopy(base),
            task,
            domain.tuning,
            domain.batch,
            domain.rate,
            seed + 100,
            markers,
            domain.rest,
        )

    control = network(name, seed, "control", out, lambda: tuned(False))
    marked = network(name, seed, "marked", out, lambda: tuned(True))
    models = {"base": base, "control": control, "marked": marked}
    row: dict[str, Any] = {"domain": name, "seed": seed, "headline": domain.headline}
    row["utility"] = {kind: headline(domain, task, model) for kind, model in models.items()}
    if name == "transcription":
        other = Transcription(unseen=True)
        row["unseen"] = {kind: headline(domain, other, model) for kind, model in models.items()}
    row["verdicts"] = [
        {"mark": p, "access": access, "network": kind, **small(judged(its, schemes[p], key, views[p], model, access))}
        for p, its in domain.parts.items() for access in its.access for kind, model in models.items()
        if kind != "base"
    ]  # fmt: skip
    if attacks:
        row["attacks"] = attacked(domain, task, views, schemes, key, marked, control, seed)
    return row


def attacked(
    domain: Domain, task: Any, views: dict[str, Any], schemes: dict[str, Any], key: OwnerKey, marked: nn.Module,
    control: nn.Module, seed: int,
) -> list[dict[str, Any]]:  # fmt: skip
    rows = []
    for label, (attack, parameters) in domain.attacks.items():
        try:
            thief = thief_of(domain, task, control, seed)
            generator = torch.Generator().manual_seed(seed)
            done = catalog.attack(attack, parameters).run(View(task, marked), thief, generator).eval()
        except GradmarkError as error:
            rows.append({"attack": label, "error": str(error)[:200]})
            continue
        guarded, model = attack.startswith("output-"), unviewed(done)
        cell: dict[str, Any] = {"attack": label, "utility": headline(domain, task, model), "verdicts": []}
        for p, its in domain.parts.items():
            if guarded and views[p] is not task:
                continue  # the guard stands before the task's own scores
            for access in ("black",) if guarded else its.access:
                found = judged(its, schemes[p], key, views[p], done if guarded else model, access, guarded)
                cell["verdicts"].append({"mark": p, "access": access, **small(found)})
        rows.append(cell)
        print(
            f"  {label}: {[(v['mark'], v['access'], round(v['log10_p'], 1)) for v in cell['verdicts']]}",
            flush=True,
        )
    return rows


def snr(step: float) -> float:
    """Decibels between a recording and what the mark adds to it."""
    return -20 * math.log10(step)


def table() -> None:
    """DOMAINS_TEXT.md from the results."""
    found = [json.loads(p.read_text()) for p in sorted(RESULTS.glob("*-*.json"))]
    text = ["# Speech recognition and text", "", "Made by `python benchmarks/domains_text.py --table`. Medians over the seeds; intervals are 95 %.", ""]  # fmt: skip
    text += ["| task | seeds | utility | control | marked | difference | mark | access | queries | log10 p, each seed | control's |", "|---|---|---|---|---|---|---|---|---|---|---|"]  # fmt: skip
    wrong, attacks = [], []
    for name, domain in DOMAINS.items():
        rows = sorted((r for r in found if r["domain"] == name), key=lambda r: r["seed"])
        if not rows:
            continue
        pairs = [(r["utility"]["control"], r["utility"]["marked"]) for r in rows]
        text += [
            _line(domain, rows, pairs, p, access) for p, its in domain.parts.items() for access in its.access
        ]
        if name == "transcription":
            unseen = [(r["unseen"]["control"], r["unseen"]["marked"]) for r in rows]
            text += [f"| {name}, unseen speaker | {len(rows)} | {_utility(domain, unseen)} | | | | | |"]
        for row in rows:
            for p, access, its in (
                (p, a, w) for p, by in row.get("strangers", {}).items() for a, w in by.items()
            ):
                wrong.append(
                    f"| {name} | {row['seed']} | {p} | {access} | {its['keys']} | {its['share_0.05']:.3f} | {its['share_0.01']:.3f} | {its['ks_p']:.2f} |"
                )
        attacks += _attack_lines(name, domain, rows)
    text += ["", "## Strangers' keys", "", "Keys never embedded, in the marked network: shares of p-values at or below .05 and .01.", "", "| task | seed | mark | access | keys | .05 | .01 | KS p |", "|---|---|---|---|---|---|---|---|", *wrong]  # fmt: skip
    text += ["", "## Attacks", "", "log10 p, median over the seeds that have the cell.", "", "| task | attack | seeds | utility after | log10 p |", "|---|---|---|---|---|", *attacks, ""]  # fmt: skip
    atomic_write(TABLE, "\n".join(text).encode(), overwrite=True)


def _utility(domain: Domain, pairs: list[tuple[float, float]]) -> str:
    relative = domain.headline == "perplexity" or domain.headline == "word_error_rate"
    change = [100 * (m / c - 1) if relative else m - c for c, m in pairs]
    low, high = mean_interval(change) if len(change) > 1 else (math.nan, math.nan)
    middle = [statistics.mean(v) for v in zip(*pairs, strict=True)]
    unit = " %" if relative else ""
    label = domain.headline.replace("_", " ")
    return f"{label} | {middle[0]:.2f} | {middle[1]:.2f} | {statistics.mean(change):+.2f}{unit} [{low:.2f}, {high:.2f}]"


def _line(
    domain: Domain, rows: list[dict[str, Any]], pairs: list[tuple[float, float]], part: str, access: str
) -> str:
    at = [v for r in rows for v in r["verdicts"] if v["mark"] == part and v["access"] == access]
    marked, control = ([v for v in at if v["network"] == kind] for kind in ("marked", "control"))
    ps, innocent = (", ".join(f"{v['log10_p']:.1f}" for v in some) for some in (marked, control))
    return f"| {rows[0]['domain']} | {len(rows)} | {_utility(domain, pairs)} | {part} | {access} | {marked[0]['queries'] or ''} | {ps} | {innocent} |"


def _attack_lines(name: str, domain: Domain, rows: list[dict[str, Any]]) -> list[str]:
    lines = []
    for label in domain.attacks:
        cells = [c for r in rows for c in r.get("attacks", []) if c["attack"] == label]
        good = [c for c in cells if "verdicts" in c]
        if not good:
            lines += [f"| {name} | {label} | | | {c['error']} |" for c in cells[:1]]
            continue
        ways = [(v["mark"], v["access"]) for v in good[0]["verdicts"]]
        found = []
        for mark, access in ways:
            ps = [
                v["log10_p"]
                for c in good
                for v in c["verdicts"]
                if (v["mark"], v["access"]) == (mark, access)
            ]
            found.append(f"{mark}, {access}: {statistics.median(ps):.1f}")
        utility = statistics.mean(c["utility"] for c in good)
        lines.append(f"| {name} | {label} | {len(good)} | {utility:.2f} | {'; '.join(found)} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--domain", choices=list(DOMAINS), action="append")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    parser.add_argument("--out", type=Path, default=HERE / "work" / "text")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--no-attacks", action="store_true")
    parser.add_argument("--table", action="store_true")
    given = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    if given.table:
        table()
        return
    for seed in given.seeds:
        for name in given.domain or DOMAINS:
            path = given.results / f"{name}-{seed}.json"
            done = json.loads(path.read_text()) if path.exists() else {}
            if not done or ("attacks" not in done and not given.no_attacks):
                start = time.process_time()
                row = {**done, **run(name, seed, given.out, not given.no_attacks)}
                row["processor_seconds"] = round(time.process_time() - start)
                keep(path, row)
                print(name, seed, row["utility"], [(v["mark"], v["access"], v["network"], round(v["log10_p"], 1)) for v in row["verdicts"]], flush=True)  # fmt: skip
    if given.results != RESULTS:
        return  # a trial
    for name in given.domain or DOMAINS:
        path = given.results / f"{name}-{given.seeds[0]}.json"
        row = json.loads(path.read_text())
        if "strangers" not in row:
            keep(path, {**row, "strangers": foreign(name, given.seeds[0], given.out)})
    table()


def foreign(name: str, seed: int, out: Path) -> dict[str, dict[str, Any]]:
    """What strangers' keys read in one seed's marked network, by mark and access."""
    domain = DOMAINS[name]
    task = domain.task()
    base, marked = (network(name, seed, kind, out, _absent) for kind in ("base", "marked"))
    return {
        p: {a: strangers(its, its.view(task, base), marked, a) for a in its.access}
        for p, its in domain.parts.items()
    }


def _absent() -> nn.Module:
    raise SystemExit("Train the networks first: run this domain and seed")


def keep(path: Path, row: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(path, (json.dumps(row, indent=1) + "\n").encode(), overwrite=True)


if __name__ == "__main__":
    main()
