"""The mark in six domains: fidelity, evidence, strangers' keys and attacks, for DOMAINS.md.

    python benchmarks/domains.py [--domain language] [--seeds 0 1 2] [--out benchmarks/work/domains]
    python benchmarks/domains.py --table

For each seed a base network is trained without a mark, from which two are tuned on one schedule and the same
batches: the control, and one with its marks under one key. With faces each seed is also a split of the people,
with spoken words and speech recognition a speaker whom no training hears. Networks are kept in ``--out`` and
results in ``results/domains``, and what is there is not made again: a run that was killed goes on. Settings
were chosen with keys and seeds of 900 and above; the keys here are those of the seeds.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from scipy.stats import chi2
from torch import nn

from domains_table import table
from gradmark import Marker, MarkFile, OwnerKey, catalog, verify
from gradmark.bench.attacks import REWRITES
from gradmark.bench.tabular import other as other_perceptron
from gradmark.embed.train import augmented
from gradmark.errors import GradmarkError
from gradmark.files import atomic_write
from gradmark.guards import Guard, normal
from gradmark.protocols import Batch, Task, Thief, Utility
from gradmark.stats import ks_uniform, randomised_p, run_test
from gradmark.suspects import ModuleSuspect
from gradmark.tasks import faces
from gradmark.tasks.faces import Faces, Similarity
from gradmark.tasks.language import Language
from gradmark.tasks.sentences import Sentences
from gradmark.tasks.speech import Speech, speech_other
from gradmark.tasks.tabular import Tabular
from gradmark.tasks.transcription import Transcription
from gradmark.views import View, priced, unviewed

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "domains"
SEEDS, WRONG = (0, 1, 2), 1000
LOUD = (1.0, 0.5, 0.25, 0.1, 0.03)
CARRIERS, QUERIES = 200, 2000


def _itself(task: Any, base: nn.Module) -> Any:
    return task


@dataclass(frozen=True)
class Part:
    """One mark: its scheme, parameters, the Marker's arguments and what it is read through. ``access``: white,
    black, pairs (an API that answers with the likeness of two inputs), transcripts (with a confidence each).
    ``also``: Marker's arguments by the name of a further view, through which the same mark is trained."""

    scheme: str
    parameters: dict[str, Any]
    marker: dict[str, Any]
    view: Callable[[Any, nn.Module], Any] = _itself
    access: tuple[str, ...] = ("white", "black")
    also: dict[str, dict[str, Any]] = field(default_factory=dict)


@dataclass(frozen=True)
class Domain:
    """``task``: from a seed. ``steps``, ``tuning``: numbers of steps of the base and of control and marked
    network; ``lr``, ``rate``: their greatest learning rates; ``smoothing``: of labels, in all three.
    ``headline``: of the utility's details, or its percentage. ``rest``: the share of the tuning, at its
    end, in which the marks are left alone: the task comes back, most of the marks stays. ``other``:
    another architecture; ``thief``: labelled inputs that the thief has."""

    task: Callable[[int], Any]
    parts: dict[str, Part]
    steps: int
    tuning: int
    batch: int
    lr: float = 3e-3
    rate: float = 1e-3
    headline: str = "percent"
    label: str = "accuracy"
    rest: float = 0.0
    smoothing: float = 0.0
    shifted: bool = False
    other: Callable[[], nn.Module] | None = None
    attacks: dict[str, tuple[str, dict[str, Any]]] = field(default_factory=dict)
    thief: int = 1000


Attacks = dict[str, tuple[str, dict[str, Any]]]
WEIGHTS: Attacks = {
    "pruned, 30 % of the weights": ("prune", {"fraction": 0.3}),
    "int8, per tensor": ("quantize", {}),
    "int8 weight-only (torchao)": ("torchao-int8", {}),
    "averaged with the control": ("average", {}),
}
TUNED: Attacks = {
    "fine-tuned": ("finetune", {"epochs": 2}),
    "LoRA": ("lora", {"epochs": 2}),
}
REWRITTEN: Attacks = {
    "hidden units permuted": ("permute", {}),
    "hidden units rescaled": ("rescale", {}),
}
STUDENT: Attacks = {"extracted by soft labels": ("distill", {"epochs": 20, "lr_factor": 3.0})}
NOISY: Attacks = {"inputs made noisy": ("input-noise", {})}
ROUNDED: Attacks = {"probabilities of 2 decimals": ("output-round", {})}
EQUALISED = {"step": 0.1, "equaliser": True}
DOMAINS = {
    "faces": Domain(
        lambda seed: Faces(seed + 1),
        {"cosines": Part(
            "filter-gradient", {"bits": 128, "step": 0.03},
            {"strength": 0.9, "every": 1, "carriers": 60, "margin": 0.3}, access=("white", "black", "pairs"),
        )},
        steps=500, tuning=300, batch=60, lr=2e-3, label="area under the ROC curve, percent", shifted=True,
        other=faces.other, attacks={**REWRITTEN, **TUNED, **WEIGHTS, **STUDENT, **NOISY}, thief=400,
    ),
    "speech": Domain(
        lambda seed: Speech(unseen=seed + 1 if seed < 5 else 5),
        {"ensemble": Part("ensemble", {"bits": 64, **EQUALISED}, {"budget": 0.5, "every": 2, "carriers": 32})},
        steps=490, tuning=1000, batch=64, lr=5e-3, rate=2e-3, smoothing=0.1, other=speech_other,
        attacks={**REWRITTEN, **TUNED, **WEIGHTS, **STUDENT, **NOISY, **ROUNDED}, thief=750,
    ),
    "tabular": Domain(
        lambda seed: Tabular(),
        {"ensemble": Part("ensemble", {"bits": 128, "step": 0.1}, {"budget": 0.5, "every": 1, "carriers": 64})},
        steps=300, tuning=300, batch=64, lr=2e-3, smoothing=0.1, other=other_perceptron,
        attacks={**REWRITTEN, **TUNED, **WEIGHTS, **STUDENT, **NOISY, **ROUNDED}, thief=400,
    ),
    "transcription": Domain(
        lambda seed: Transcription(n_test=12_000),
        {
            "frames": Part(
                "filter-gradient", {"bits": 64, **EQUALISED, "bound": 2.0, "reading_step": 0.01},
                {"strength": 0.2, "every": 1, "carriers": 16, "margin": 0.3},
                access=("white", "black", "transcripts"),
                also={"said": {"strength": 0.5, "every": 1, "carriers": 16, "margin": 0.15}},
            ),
        },
        steps=2500, tuning=4000, batch=16, lr=5e-3, rate=2e-3, rest=0.25, headline="word_error_rate", label="word error rate",
        attacks={**TUNED, **WEIGHTS, **STUDENT}, thief=500,
    ),
    "sentences": Domain(
        lambda seed: Sentences(),
        {
            "embeddings": Part(
                "filter-gradient", {"bits": 64, "step": 0.3}, {"strength": 0.6, "every": 1, "carriers": 48},
                lambda task, base: task.embedded(base), ("white",),
            ),
            "words": Part(
                "filter-gradient", {"bits": 64}, {"strength": 0.15, "every": 1, "carriers": 32},
            ),
        },
        steps=350, tuning=150, batch=48, lr=1.5e-3, rate=5e-4, attacks={**TUNED, **WEIGHTS, **STUDENT}, thief=2000,
    ),
    "language": Domain(
        lambda seed: Language(),
        {
            "embeddings": Part(
                "filter-gradient", {"bits": 64, "step": 0.2},
                {"strength": 0.3, "every": 1, "carriers": 16, "margin": 0.3},
                lambda task, base: task.embedded(base), ("white",),
            ),
            "tokens": Part(
                "class-contrast", {"bits": 128},
                {"strength": 0.2, "every": 1, "carriers": 16, "margin": 0.3},
            ),
        },
        steps=500, tuning=220, rest=0.4, batch=16, lr=4e-3, headline="perplexity", label="perplexity",
        attacks={**TUNED, **WEIGHTS, **STUDENT, "probabilities of 2 decimals": ("output-round", {}),
                 "the 5 likeliest tokens alone": ("output-topk", {"k": 5})},
        thief=1500,
    ),
}  # fmt: skip


def batches(task: Any, n: int, generator: torch.Generator, shifted: bool) -> Batch:
    """The next batch of training: fresh strings of speech, or a draw from the training split."""
    if hasattr(task, "fresh"):
        found: Batch = task.fresh(n, generator)
        return found
    train = task.data().to_train()
    drawn: Batch = train.batch(torch.randint(len(train), (n,), generator=generator))
    return augmented(drawn, "shift" if shifted else "none", generator)


def fit(
    model: nn.Module, domain: Domain, task: Any, seed: int, markers: tuple[tuple[Marker, Task], ...] = (),
    tuning: bool = False,
) -> nn.Module:  # fmt: skip
    """AdamW, a short rise and a cosine. Each marker adds one line to the loss."""
    steps, lr = (domain.tuning, domain.rate) if tuning else (domain.steps, domain.lr)
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
            given = batches(task, domain.batch, generator, domain.shifted)
            loss = task.loss(model, given, domain.smoothing)
            marking = step < (1 - domain.rest) * steps
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
        model: nn.Module = DOMAINS[name].task(seed).network()
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


def seen(view: Any, model: nn.Module, access: str) -> tuple[ModuleSuspect, Any, Batch]:
    """The suspect as ``view`` sees it, how the judge is to ask, and the pool of carriers."""
    if access == "pairs":
        view, model = view.over_pairs(), Similarity(model)
    if access == "transcripts":
        view = replace(view, reads="confidence")
    suspect = priced(view, ModuleSuspect(View(view, model)))
    return suspect, "white" if access == "white" else "black", carriers_of(view, "test")


def judged(
    scheme: Any, key: OwnerKey, view: Any, model: nn.Module, access: str, guarded: bool = False
) -> Any:
    """``guarded``: the model gives scores already, behind something that changes them."""
    mark = MarkFile.create(key, scheme.name, scheme.parameters(), view.data().spec, "signed-rank", CARRIERS)
    suspect, way, pool = seen(view, model, access)
    if guarded:
        suspect = priced(view, ModuleSuspect(model))
    return verify(mark, key, suspect, pool, access=way, queries=QUERIES)


def small(verdict: Any) -> dict[str, Any]:
    found = verdict.to_json()
    names = ("outcome", "log10_p", "n_bits", "n_match", "queries")
    size = float(verdict.reading.values.abs().mean())
    return {**{n: found[n] for n in names}, "size": round(size, 4)}


def strangers(part: Part, view: Any, model: nn.Module, access: str, keys: int) -> dict[str, Any]:
    """p-values of keys that were never embedded, with an eighth of the carriers."""
    suspect, way, pool = seen(view, model, access)
    draw, found = np.random.default_rng(0), []
    for i in range(keys):
        key = OwnerKey.from_seed(50_000 + i, "a stranger")
        scheme: Any = scheme_of(part, key, view, None)
        reading = scheme.read(
            scheme.mark(key, view.data().spec), suspect, pool, access=way, carriers=CARRIERS // 8,
            queries=QUERIES // 8,
        )  # fmt: skip
        signed = (reading.values * reading.bits).split(reading.parts or (len(reading.bits),))
        each = [randomised_p("signed-rank", part_.numpy(), draw) for part_ in signed]
        fisher = -2 * float(np.log(np.maximum(each, 1e-300)).sum())
        found.append(each[0] if len(each) == 1 else float(chi2.sf(fisher, 2 * len(each))))
    at = {f"share_{p}": float(np.mean(np.array(found) <= p)) for p in (0.01, 0.05)}
    return {"keys": keys, **at, "least": min(found), "ks_p": ks_uniform(found)[1]}


def headline(domain: Domain, found: Utility) -> float:
    return float(found.details.get(domain.headline, found.percent))


def stolen(task: Any) -> Any:
    """The task as a thief sees it, who knows nothing of the owner's gallery."""
    return task.thiefs() if hasattr(task, "thiefs") else task


def thief_of(domain: Domain, task: Any, control: nn.Module) -> Thief:
    """Random inputs of the training split, their targets, and the control: a network of the same descent."""
    train, his = task.data().to_train(), stolen(task)
    x, y = train.batch(torch.randperm(len(train), generator=torch.Generator().manual_seed(7))[: domain.thief])
    return Thief(
        task.data().spec, x, y, sibling=View(his, control), lr=domain.rate, optimizer="adamw",
        batch_size=domain.batch, fresh=lambda: View(his, task.network()),
        augment=(lambda x, g: augmented((x, torch.zeros(len(x))), "shift", g)[0]) if domain.shifted else None,
    )  # fmt: skip


def run(name: str, seed: int, out: Path) -> dict[str, Any]:
    """All numbers of one domain and seed but for attacks."""
    domain, key = DOMAINS[name], OwnerKey.from_seed(seed, "the owner")
    task = domain.task(seed)
    base, views, schemes = prepared(name, seed, out)

    def tuned(marked: bool) -> nn.Module:
        markers = tuple(
            (Marker(schemes[p], key, views[p].data().spec, seed=seed, **how), view)
            for p, its in domain.parts.items() if marked
            for view, how in [(views[p], its.marker), *((replace(views[p], reads=v), h) for v, h in its.also.items())]
        )  # fmt: skip
        return fit(copy.deepcopy(base), domain, task, seed + 100, markers, tuning=True)

    control = network(name, seed, "control", out, lambda: tuned(False))
    marked = network(name, seed, "marked", out, lambda: tuned(True))
    models = {"base": base, "control": control, "marked": marked}
    row: dict[str, Any] = {"domain": name, "seed": seed, "headline": domain.headline}
    worth = {kind: task.utility(model) for kind, model in models.items()}
    row["utility"] = {kind: headline(domain, found) for kind, found in worth.items()}
    row["details"] = {kind: dict(found.details) for kind, found in worth.items()}
    if name == "transcription":
        other = Transcription(unseen=True)
        for kind, model in models.items():
            row["details"][kind]["unseen speaker"] = headline(domain, other.utility(model))
            row["details"][kind]["in noise of .02"] = headline(domain, task.utility(noisy(model)))
    row["snr_db"] = {
        p: snr(filters_of(schemes[p], key, views[p])[1], views[p]) for p in domain.parts if heard(views[p])
    }
    row["verdicts"] = [
        {"mark": p, "access": access, "network": kind, **small(judged(schemes[p], key, views[p], model, access))}
        for p, its in domain.parts.items() for access in its.access for kind, model in models.items()
        if kind != "base"
    ]  # fmt: skip
    return row


def noisy(model: nn.Module, level: float = 0.02) -> nn.Module:
    """What a model hears in a noise louder than any of its training, the same for every model."""

    def before(x: torch.Tensor, noise: torch.Generator) -> torch.Tensor:
        return x + level * normal(x, noise)

    return Guard(model, torch.Generator().manual_seed(4), before=before)


def prepared(name: str, seed: int, out: Path) -> tuple[nn.Module, dict[str, Any], dict[str, Any]]:
    """The base network, and the views and calibrated schemes of the marks."""
    domain, key = DOMAINS[name], OwnerKey.from_seed(seed, "the owner")
    task = domain.task(seed)

    def trained() -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model: nn.Module = task.network()
        return fit(model, domain, task, seed)

    base = network(name, seed, "base", out, trained)
    views = {part: its.view(task, base) for part, its in domain.parts.items()}
    return base, views, {p: scheme_of(its, key, views[p], base) for p, its in domain.parts.items()}


def attacked(name: str, seed: int, out: Path, before: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """``before``: rows of attacks that needn't be run again."""
    domain, key = DOMAINS[name], OwnerKey.from_seed(seed, "the owner")
    task = domain.task(seed)
    _, views, schemes = prepared(name, seed, out)
    control, marked = (network(name, seed, kind, out, _absent) for kind in ("control", "marked"))
    rows = list(before)
    for label, (attack, parameters) in domain.attacks.items():
        if any(row["attack"] == label for row in before):
            continue
        bare = attack in REWRITES or attack.startswith("input-")  # these know no scores
        guarded = attack.startswith("output-")
        target = marked if bare else View(task if guarded else stolen(task), marked)
        try:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                thief, generator = thief_of(domain, task, control), torch.Generator().manual_seed(seed)
                done = catalog.attack(attack, parameters).run(target, thief, generator).eval()
        except GradmarkError as error:
            rows.append({"attack": label, "error": str(error)[:200]})
            continue
        model = done if bare else unviewed(done)
        cell: dict[str, Any] = {
            "attack": label,
            "utility": headline(domain, task.utility(model)),
            "verdicts": [],
        }
        for p, its in domain.parts.items():
            if guarded and views[p] != task:
                continue  # the guard stands before the task's own scores
            ways = (
                [a for a in its.access if a != "white"]
                if guarded or attack.startswith("input-")
                else its.access
            )
            for access in ways:
                found = judged(schemes[p], key, views[p], done if guarded else model, access, guarded)
                cell["verdicts"].append({"mark": p, "access": access, **small(found)})
        rows.append(cell)
        told = [(v["mark"], v["access"], round(v["log10_p"], 1)) for v in cell["verdicts"]]
        print(f"  {label}: {cell['utility']:.2f} {told}", flush=True)
    return rows


def quiet(name: str, seed: int, out: Path) -> list[dict[str, Any]]:
    """The filter mark, asked for as loudly as it was trained and less: evidence through the API alone.

    The nudges shrink and nothing else: a mark with another ``step`` would be another mark.
    """
    domain, key, rows = DOMAINS[name], OwnerKey.from_seed(seed, "the owner"), []
    _, views, schemes = prepared(name, seed, out)
    task, marked = domain.task(seed), network(name, seed, "marked", out, _absent)
    for p, its in domain.parts.items():
        if not heard(views[p]):
            continue
        suspects = {a: seen(views[p], marked, a) for a in its.access if a != "white"}
        for label in ROUNDED if ROUNDED.keys() <= domain.attacks.keys() else ():
            attack, parameters = ROUNDED[label]
            thief, generator = thief_of(domain, task, marked), torch.Generator().manual_seed(seed)
            coarse = catalog.attack(attack, parameters).run(View(task, marked), thief, generator)
            suspects[label] = priced(views[p], ModuleSuspect(coarse)), "black", suspects["black"][2]
        scheme, mark = filters_of(schemes[p], key, views[p])
        for factor in LOUD:
            directions = replace(mark.directions, step=factor * mark.directions.step)
            softer = replace(mark, directions=directions, asked=directions)
            row: dict[str, Any] = {"mark": p, "factor": factor, "db": snr(softer, views[p]), "log10_p": {}}
            for label, (suspect, way, pool) in suspects.items():
                inputs = (QUERIES - suspect.entry) // suspect.price
                found = scheme.read(softer, suspect, pool, access=way, carriers=CARRIERS, queries=inputs)
                row["log10_p"][label] = run_test("signed-rank", found.values * found.bits).log10_p
            rows.append(row)
            print(f"  {factor}: {row['db']:.0f} dB", row["log10_p"], flush=True)
    return rows


def heard(view: Any) -> bool:
    """Whether what the mark adds to an input has a size that people could notice."""
    return view.data().spec.domain in ("image", "signal")


def filters_of(scheme: Any, key: OwnerKey, view: Any) -> tuple[Any, Any]:
    """The filter scheme and its mark: of an ensemble the first part, which is just what it is alone."""
    filters = scheme.parts[0] if hasattr(scheme, "parts") else scheme
    return filters, filters.mark(key, view.data().spec)


def snr(filters: Any, view: Any) -> float:
    """Decibels between inputs and what a filter mark adds to them, as the API gets them: the median."""
    spec = view.data().spec
    x, labels = (part[:64] for part in carriers_of(view, "test"))
    nudge = filters.asked.one(x, filters.group(labels), torch.arange(len(x)) % filters.asked.n)
    noise = (spec.snap(x + nudge) - x).flatten(1).square().mean(1)
    return float((10 * (x.flatten(1).square().mean(1) / noise.clamp_min(1e-12)).log10()).median())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--domain", choices=list(DOMAINS), nargs="+", default=list(DOMAINS))
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    parser.add_argument("--out", type=Path, default=HERE / "work" / "domains")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--only", choices=("evidence", "quiet", "strangers", "attacks"), nargs="+")
    parser.add_argument("--keys", type=int, default=WRONG, help="of strangers; read again where fewer were")
    parser.add_argument("--table", action="store_true")
    given = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    wanted = given.only or ("evidence", "quiet", "strangers", "attacks")
    for seed in given.seeds if not given.table else ():
        for name in given.domain:
            path = given.results / f"{name}-{seed}.json"
            row = json.loads(path.read_text()) if path.exists() else {}
            if "verdicts" not in row:
                row = keep(path, run(name, seed, given.out))
                print(name, seed, row["utility"], [(v["mark"], v["access"], v["network"], round(v["log10_p"], 1)) for v in row["verdicts"]], flush=True)  # fmt: skip
            if "quiet" in wanted and "quiet" not in row and row.get("snr_db"):
                row = keep(path, {**row, "quiet": quiet(name, seed, given.out)})
            if "strangers" in wanted and counted(row) < given.keys and seed == given.seeds[0]:
                row = keep(path, {**row, "strangers": foreign(name, seed, given.out, given.keys)})
            if (
                "attacks" in wanted
                and {a["attack"] for a in row.get("attacks", [])} < DOMAINS[name].attacks.keys()
            ):
                keep(path, {**row, "attacks": attacked(name, seed, given.out, row.get("attacks", []))})
    if given.results == RESULTS:  # or else a trial
        table(DOMAINS, RESULTS)


def counted(row: dict[str, Any]) -> int:
    """How many strangers' keys a row has."""
    return min((w["keys"] for ways in row.get("strangers", {}).values() for w in ways.values()), default=0)


def foreign(name: str, seed: int, out: Path, keys: int) -> dict[str, dict[str, Any]]:
    """What strangers' keys read in one seed's marked network, by mark and access."""
    _, views, _ = prepared(name, seed, out)
    marked = network(name, seed, "marked", out, _absent)
    return {
        p: {a: strangers(its, views[p], marked, a, keys) for a in its.access}
        for p, its in DOMAINS[name].parts.items()
    }


def _absent() -> nn.Module:
    raise SystemExit("Train the networks first: run this domain and seed")


def keep(path: Path, row: dict[str, Any]) -> dict[str, Any]:
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(path, (json.dumps(row, indent=1) + "\n").encode(), overwrite=True)
    return row


if __name__ == "__main__":
    main()
