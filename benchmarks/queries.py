"""How many queries a step-by-step verification needs until e >= 1e9, as an API tells less and less.

    python benchmarks/queries.py --networks FOLDER [--task cifar10] [--seeds 0 1 2]    measure, and resume
    python benchmarks/queries.py --table                                               QUERIES.md and its picture

FOLDER holds the benchmark's networks (``gradmark bench`` keeps them in ``OUT/networks``). A cell is one
network behind one API, read with one choice of the mark's parts.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

import torch

from gradmark import catalog
from gradmark._version import __version__
from gradmark.bench.experiment import find_experiment
from gradmark.bench.store import Wanted, about, calibrated, obtain, owner_key
from gradmark.bench.suite import Entry
from gradmark.keys import OwnerKey
from gradmark.protocols import Thief
from gradmark.sequential import Sequential
from gradmark.suspects import ModuleSuspect

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "queries"
TARGET, BUDGET = 9.0, 4000
GRADSIGNS = 19_250
PARTS = {
    "all": (0, 1, 2),
    "without triggers": (0, 1),
    "filter-gradient": (0,),
    "class-contrast": (1,),
    "trigger": (2,),
}
APIS: dict[str, list[tuple[str, dict[str, Any]]]] = {
    "4 decimals": [("output-round", {"decimals": 4})],
    "3 decimals": [("output-round", {"decimals": 3})],
    "2 decimals": [("output-round", {"decimals": 2})],
    "1 decimal": [("output-round", {"decimals": 1})],
    "JPEG inputs, 4 decimals": [("input-jpeg", {"quality": 75}), ("output-round", {"decimals": 4})],
    "noise .01, 4 decimals": [("output-noise", {"level": 0.01}), ("output-round", {"decimals": 4})],
    "noise .05, 4 decimals": [("output-noise", {"level": 0.05}), ("output-round", {"decimals": 4})],
    "top 1 label only": [("output-top1", {})],
}


def cells(task_name: str, seeds: list[int], folder: Path, chosen: list[str]) -> Iterator[dict[str, Any]]:
    """Every cell that isn't there yet; innocent ones are read with all parts. ``chosen``: of PARTS."""
    task, entry = find_experiment(task_name), Entry("ensemble")
    data = task.data()
    pool = task.carriers()
    for seed in seeds:
        marked = Wanted(task_name, "marked", seed, entry)
        if not (folder / f"{marked.name}.safetensors").exists() and task.pretrain is not None:
            print(f"{marked.name} isn't there yet", flush=True)
            continue
        key = owner_key(seed)
        scheme = calibrated(entry, task_name, seed, key, folder)
        stranger = OwnerKey.from_seed(seed + 10_000, "stranger")
        foreign = calibrated(entry, task_name, seed, stranger, folder)
        whom = [
            ("marked", marked, scheme.mark(key, data.spec), scheme, PARTS),
            (
                "control",
                Wanted(task_name, "control", seed),
                scheme.mark(key, data.spec),
                scheme,
                {"all": PARTS["all"]},
            ),
            (
                "marked, stranger's key",
                marked,
                foreign.mark(stranger, data.spec),
                foreign,
                {"all": PARTS["all"]},
            ),
        ]
        for who, wanted, mark, read_by, choices in whom:
            model, digest = obtain(wanted, folder), about(wanted, folder)["digest"]
            for api, steps in APIS.items():
                for parts, numbers in choices.items():
                    if parts not in chosen or (who != "marked" and chosen != list(PARTS)):
                        continue
                    place = (
                        RESULTS
                        / task_name
                        / f"{seed}-{who}-{api}-{parts}.json".replace(" ", "_").replace("'", "")
                    )
                    if place.exists() and json.loads(place.read_text())["network"] == digest:
                        continue
                    thief, guarded = Thief(data.spec, *data.test.batch(slice(0, 2))), model
                    for name, settings in steps:
                        guarded = catalog.attack(name, settings).run(
                            guarded, thief, torch.Generator().manual_seed(seed)
                        )
                    asked = [read_by.questions(mark, pool, 200)[i] for i in numbers]
                    start = time.perf_counter()
                    suspect = ModuleSuspect(guarded, name=who)
                    run = Sequential(suspect, asked, data.spec.n_classes).run(TARGET, BUDGET)
                    place.parent.mkdir(parents=True, exist_ok=True)
                    row = {
                        "task": task_name, "seed": seed, "network": digest, "suspect": who, "api": api, "parts": parts,
                        "log10_e": run.log10_e, "log10_best": run.log10_best, "queries": run.queries,
                        "bits_bet_on": run.usable, "evidence": run.evidence, "seconds": round(time.perf_counter() - start, 2),
                        "version": __version__,
                    }  # fmt: skip
                    place.write_text(json.dumps(row) + "\n")
                    yield row


def rows() -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in sorted(RESULTS.glob("*/*.json"))]


def table(found: list[dict[str, Any]], task: str) -> list[str]:
    """A row for each API: the queries until e >= 1e9, or what e was when the budget or the questions were spent."""
    seeds = sorted({r["seed"] for r in found if r["task"] == task})
    lines = [
        f"## {task}, seeds {', '.join(map(str, seeds))}", "",
        "| what the API tells | " + " | ".join(PARTS) + " | control, greatest e | stranger's key, greatest e |",
        "|---|" + "---|" * (len(PARTS) + 2),
    ]  # fmt: skip
    for api in APIS:
        cells = []
        for parts in PARTS:
            some = [
                r
                for r in found
                if (r["task"], r["suspect"], r["api"], r["parts"]) == (task, "marked", api, parts)
            ]
            cells.append(shown(some))
        for who in ("control", "marked, stranger's key"):
            some = [r for r in found if (r["task"], r["suspect"], r["api"]) == (task, who, api)]
            cells.append(", ".join(f"10^{r['log10_best']:.1f}" for r in some) or "")
        lines.append(f"| {api} | " + " | ".join(cells) + " |")
    return [*lines, ""]


def shown(some: list[dict[str, Any]]) -> str:
    if not some:
        return ""
    each = [
        str(r["queries"]) if r["log10_e"] >= TARGET else f"e = 10^{r['log10_e']:.1f} at {r['queries']}"
        for r in some
    ]
    middle = median([r["queries"] if r["log10_e"] >= TARGET else float("inf") for r in some])
    best = f"**{middle:g}**" if middle < float("inf") else "not reached"
    return best if len(each) == 1 and middle < float("inf") else f"{best} ({'; '.join(each)})"


def nulls() -> list[str]:
    path = RESULTS / "nulls.json"
    if not path.exists():
        return []
    lines = [
        "## Suspects that cheat", "",
        "`python benchmarks/nulls.py`: suspects that answer without the bits, but see every bit that was looked at, or are as",
        "wild as numbers can be. The share of runs whose wealth ever reached 1/alpha, with its 95 % interval; at most alpha is promised.", "",
        "| suspect | runs | alpha .1 | .01 | .001 | greatest log10 e |", "|---|---|---|---|---|---|",
    ]  # fmt: skip
    for r in json.loads(path.read_text())["rows"]:
        rates = [f"{v[0]:.4f} [{v[1]:.4f}, {v[2]:.4f}]" for v in r["rate"].values()]
        lines.append(f"| {r['suspect']} | {r['runs']} | {' | '.join(rates)} | {r['largest']:.2f} |")
    return [*lines, ""]


def picture(found: list[dict[str, Any]], path: Path) -> None:
    """log10 e against queries: all parts, every API, the median-like first seed of each task."""
    from gradmark.report.canvas import CYCLE, canvas, threshold

    tasks = sorted({r["task"] for r in found})
    with canvas(8.4, 3.4 * len(tasks), rows=len(tasks), columns=2) as c:
        for i, task in enumerate(tasks):
            for axes, parts in zip(c.axes[i], ("all", "without triggers"), strict=True):
                for j, api in enumerate(APIS):
                    mine = [
                        r
                        for r in found
                        if (r["task"], r["suspect"], r["api"], r["parts"]) == (task, "marked", api, parts)
                    ]
                    for k, r in enumerate(mine):
                        q, e = zip((4, 0.0), *r["evidence"], strict=True)
                        style = {"color": CYCLE[j % len(CYCLE)], "linestyle": "-" if j < len(CYCLE) else ":"}
                        axes.plot(
                            q,
                            e,
                            linewidth=1.1,
                            label=api if k == 0 else None,
                            drawstyle="steps-post",
                            **style,
                        )
                threshold(axes, TARGET, "e = 1e9")
                axes.set(xscale="log", xlabel="queries", ylabel="log10 e", title=f"{task}, {parts}")
                axes.set(xlim=(4, BUDGET * 1.1))
                axes.xaxis.set_major_formatter("{x:,.0f}")
            c.axes[i][0].legend(fontsize=6.5, loc="lower right", bbox_to_anchor=(1, 0.1))
    path.write_bytes(c.data)


def write() -> None:
    found = rows()
    text = [
        "# Queries until the evidence suffices", "",
        "Made by `python benchmarks/queries.py --table` from `results/queries`. Inputs have 8 bits; the API gives probabilities.",
        f"Queries until e >= 1e{TARGET:.0f}, the median over seeds in bold (in brackets each seed), by the parts of the mark that are read;",
        f"at most {BUDGET} queries. The method and its proof are in `docs/sequential.md`. GradSigns as published takes {GRADSIGNS:,} queries for 64 bits.",
        "Triggers alone reach it whatever the API tells. The other columns are for a thief who notices them: without triggers two",
        "decimals, or noise of .01, still suffice, one decimal, noise of .05 or the label alone don't.", "",
        *[line for task in sorted({r["task"] for r in found}) for line in table(found, task)], *nulls(),
        "![e against queries](results/queries/curves.svg)", "",
    ]  # fmt: skip
    (HERE / "QUERIES.md").write_text("\n".join(text))
    picture(found, RESULTS / "curves.svg")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--networks", type=Path)
    parser.add_argument("--task", default="cifar10")
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument(
        "--parts", nargs="*", default=list(PARTS), help="some of them, of marked networks alone"
    )
    parser.add_argument("--table", action="store_true")
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.networks is not None:
        for row in cells(given.task, given.seeds, given.networks, given.parts):
            told = ("seed", "suspect", "api", "parts", "queries", "log10_e")
            print(*(row[name] for name in told), flush=True)
    if given.table:
        write()


if __name__ == "__main__":
    main()
