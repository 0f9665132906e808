"""Faces, spoken digits, tabular data: the mark in each, its price, and what attacks leave of it.

    python benchmarks/domains.py [--out domains-out] [--part tabular|faces|speech] [--attacks]
    python benchmarks/domains.py --page

Three seeds of each; with faces a seed is also a split of the people, with speech a speaker left out. Marked and
control are trained on the same schedule. Networks, cells and ``extra-*.json`` in OUT are finished work and
skipped; everything is gathered into ``results/domains.json``, of which ``--page`` makes DOMAINS.md.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gradmark.bench.attacks import select, standard
from gradmark.bench.cells import owner_key
from gradmark.bench.experiment import find_experiment
from gradmark.bench.run import run_suite
from gradmark.bench.store import Wanted, about, calibrated, obtain
from gradmark.bench.suite import Entry, Suite
from gradmark.codec import MarkFile
from gradmark.keys import OwnerKey
from gradmark.stats import mean_interval
from gradmark.suspects import ModuleSuspect
from gradmark.tasks.faces import Similarity
from gradmark.verify import verify
from gradmark.views import suspected

HERE = Path(__file__).parent
RESULTS, PAGE = HERE / "results" / "domains.json", HERE / "DOMAINS.md"
PARTS: dict[str, tuple[str, tuple[tuple[str, int], ...]]] = {  # scheme, and (experiment, seed)
    "tabular": ("ensemble", (("tabular", 1), ("tabular", 2), ("tabular", 3))),
    "faces": ("filter-gradient", (("faces-1", 1), ("faces-2", 2), ("faces-3", 3))),
    "speech": ("ensemble", (("speech-1", 1), ("speech-2", 2), ("speech-3", 3))),
}
FIRST_STRANGER = 880_000
KEYS = {
    "white": 20,
    "black": 10,
}  # foreign keys for each network, uncalibrated: that saves a reading of the control
Row = dict[str, Any]


def attacks(part: str) -> list[Any]:
    """What applies: rewrites, weights, training, extraction, an API that rounds or is noisy."""
    few = [
        "none",
        "permute",
        "rescale",
        "prune-0.5",
        "quantize-4",
        "noise-0.1",
        "finetune-lr1",
        "distill",
        "input-noise",
    ]
    return few if part == "faces" else [*few, "output-round-2"]


def suites(part: str, whole: bool) -> Iterator[Suite]:
    scheme, runs = PARTS[part]
    for name, seed in runs:
        found = select(attacks(part) if whole else ["none"], standard(tune=2, extract=10))
        yield Suite(f"{part}-{seed}", (name,), (Entry(scheme),), found, (seed,), wrong_keys=0)


def extra(part: str, name: str, seed: int, out: Path) -> Row:
    """What the suite's cells don't hold: foreign keys, an API that takes pairs, details, what is audible."""
    experiment, entry, folder = find_experiment(name), Entry(PARTS[part][0]), out / "networks"
    task, spec = experiment.task, experiment.data().spec
    wanted = {"marked": Wanted(name, "marked", seed, entry), "control": Wanted(name, "control", seed)}
    nets = {kind: obtain(w, folder) for kind, w in wanted.items()}
    row: Row = {"part": part, "task": name, "seed": seed, "foreign": {}, "owner": {}}
    for kind, w in wanted.items():
        known = about(w, folder)
        row[kind] = {k: known[k] for k in ("utility", "utility_n", "utility_details", "seconds")}
    pool = experiment.carriers()

    def ask(key: OwnerKey, kind: str, way: str) -> float:
        own = key.key_id == owner_key(seed).key_id
        scheme = calibrated(entry, experiment, seed, key, folder) if own else entry.scheme(name)
        mark = MarkFile.create(
            key, scheme.name, scheme.parameters(), spec, "signed-rank", 200, salt=bytes(16)
        )
        seen, suspect = task, ModuleSuspect(nets[kind])
        if way == "pairs":
            seen, suspect = task.over_pairs(), ModuleSuspect(Similarity(nets[kind]))
        verdict = verify(
            mark, key, suspected(seen, suspect), pool, access="white" if way == "white" else "black"
        )
        return round(verdict.log10_p, 3)

    ways = ["white", "black", *(["pairs"] if part == "faces" else [])]
    for way in ways:
        row["owner"][way] = {kind: ask(owner_key(seed), kind, way) for kind in nets}
    for way, n in KEYS.items():
        n = n if part == "tabular" else n // 2
        keys = [OwnerKey.from_seed(FIRST_STRANGER + 1000 * seed + i, "a stranger") for i in range(n)]
        row["foreign"][way] = [ask(key, "marked", way) for key in keys]
    mark = calibrated(entry, experiment, seed, owner_key(seed), folder).mark(owner_key(seed), spec)
    filters = mark.parts[0] if hasattr(mark, "parts") else mark
    x, labels = pool[0][:64], pool[1][:64]
    moved = spec.snap(
        x + filters.directions.one(x, filters.group(labels), torch.arange(len(x)) % filters.directions.n)
    )
    noise = (moved - x).flatten(1).square().mean(1)
    row["snr_db"] = float((10 * (x.flatten(1).square().mean(1) / noise.clamp_min(1e-12)).log10()).median())
    row["rms"] = float(noise.sqrt().mean())
    return row


def measure(part: str, out: Path, whole: bool) -> None:
    for suite, (name, seed) in zip(suites(part, whole), PARTS[part][1], strict=True):
        print(part, name, run_suite(suite, out), flush=True)
        path = out / f"extra-{name}-{seed}.json"
        if not path.exists():
            path.write_text(json.dumps(extra(part, name, seed, out)))
        gather(out)


def gather(out: Path) -> None:
    """Everything finished in OUT into the results, numbers rounded to what they are worth."""
    kept = ("task", "scheme", "attack", "parameters", "seed", "access", "utility_control", "utility_marked", "utility_after",
            "stealing_loss", "log10_p", "match", "n_bits", "queries", "seconds", "versions", "error")  # fmt: skip
    cells = []
    for path in sorted((out / "cells").rglob("*.json")):
        cells += [{k: c[k] for k in kept if k in c} for c in json.loads(path.read_text())]
    rows = [json.loads(p.read_text()) for p in sorted(out.glob("extra-*.json"))]
    RESULTS.write_text(json.dumps(_short({"cells": cells, "extra": rows}), indent=1) + "\n")


def _short(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _short(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_short(v) for v in value]
    return round(value, 4) if isinstance(value, float) else value


def page(found: Row) -> Iterator[str]:
    yield "# The mark in other domains\n"
    yield (
        "Made by `benchmarks/domains.py` from `results/domains.json`. Three seeds of each task, a control of the same schedule beside "
        "every marked network, 200 carriers, 2,000 queries. With faces each seed is another split of the people, with speech another "
        "speaker is left out of training. The faces are 112 x 92 pixels shrunk to 28 x 23. Means with 95 % intervals (t), "
        "log10 p as median [weakest].\n"
    )
    for part in PARTS:
        rows = [r for r in found["extra"] if r["part"] == part]
        if rows:
            yield from _part(part, rows)
            yield from _attacked([c for c in found["cells"] if c["task"] in {r["task"] for r in rows}])


def _part(part: str, rows: list[Row]) -> Iterator[str]:
    yield f"## {part}\n"
    yield from _table(
        ("log10 p", "marked", "control"),
        (
            (way, *(_evidence([r["owner"][way][kind] for r in rows]) for kind in ("marked", "control")))
            for way in rows[0]["owner"]
        ),
    )
    p = {way: 10 ** np.array([v for r in rows for v in r["foreign"][way]]) for way in rows[0]["foreign"]}
    yield "Foreign keys on the marked networks (" + ", ".join(
        f"{way}: {len(v)} keys, {np.mean(v <= 0.05):.3f} at or below .05, least p {v.min():.4f}" for way, v in p.items()
    ) + ").\n"  # fmt: skip
    yield f"A nudged input differs by {np.mean([r['rms'] for r in rows]):.4f} (root mean square): {np.mean([r['snr_db'] for r in rows]):.1f} dB below the input.\n"
    pairs = [(r["control"]["utility"], r["marked"]["utility"]) for r in rows]
    table = [("utility, percent", *_compared(pairs))]
    for name in rows[0]["control"]["utility_details"]:
        pairs = [(r["control"]["utility_details"][name], r["marked"]["utility_details"][name]) for r in rows]
        table.append((name, *_compared(pairs)))
    yield from _table(("measure", "control", "marked", "marked - control"), table)


def _compared(pairs: list[tuple[float, float]]) -> tuple[str, str, str]:
    a, b = np.array(pairs).T
    digits = 2 if a.max() > 2 else 4
    spread = "" if len(a) < 2 else " [{:.{d}f}, {:.{d}f}]".format(*mean_interval((b - a).tolist()), d=digits)
    return f"{a.mean():.{digits}f}", f"{b.mean():.{digits}f}", f"{(b - a).mean():+.{digits}f}{spread}"


def _attacked(cells: list[Row]) -> Iterator[str]:
    done = [c for c in cells if "error" not in c]
    rows = []
    for attack in dict.fromkeys(
        c["attack"] for c in sorted(cells, key=lambda c: (c["attack"] != "none", c["attack"]))
    ):
        own = [c for c in done if c["attack"] == attack]
        errors = {c["error"] for c in cells if c["attack"] == attack and "error" in c}
        by = [[c["log10_p"] for c in own if c["access"] == a] for a in ("white", "black")]
        loss = {c["seed"]: c["stealing_loss"] for c in own}.values()
        rows.append(
            (
                attack,
                len(loss),
                *(_evidence(p) if p else "" for p in by),
                f"{np.mean(list(loss)):+.2f}" if loss else "; ".join(errors),
            )
        )
    yield from _table(("attack", "seeds", "log10 p white-box", "black-box", "the thief's loss, points"), rows)


def _evidence(values: list[float]) -> str:
    return f"{np.median(values):.1f} [{max(values):.1f}]"


def _table(head: Iterable[str], rows: Iterable[Iterable[Any]]) -> Iterator[str]:
    head = list(head)
    yield "| " + " | ".join(head) + " |"
    yield "|" + "---|" * len(head)
    yield from ("| " + " | ".join(str(v) for v in row) + " |" for row in rows)
    yield ""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("domains-out"))
    parser.add_argument("--part", choices=list(PARTS), nargs="*", default=list(PARTS))
    parser.add_argument("--attacks", action="store_true", help="not the unattacked networks alone")
    parser.add_argument("--page", action="store_true", help="only make DOMAINS.md from the results")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if not args.page:
        args.out.mkdir(parents=True, exist_ok=True)
        for part in args.part:
            measure(part, args.out, False)
        for part in args.part if args.attacks else ():
            measure(part, args.out, True)
    PAGE.write_text("\n".join(page(json.loads(RESULTS.read_text()))))


if __name__ == "__main__":
    main()
