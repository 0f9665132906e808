"""Can a mark be told without its key? A population of digits networks, marked and not, and the AUCs.

    python benchmarks/detect.py [--pairs 40] [--variant default|hidden] [--strength RATIO] [--out FILE]

``hidden`` embeds class contrasts alone, the part that changes no response to unusual inputs: what it costs
to be found less; ``--strength`` pushes it in more weakly yet. Marked and unmarked networks are trained on labels smoothed alike, which tells nothing of a mark.
Every network has a seed, and every marked one a key, that no other has. The attacker knows the data, the
recipe and the scheme with its parameters, has an unmarked network of their own, and has trained such a
population; they look at weights and at input gradients along throwaway keys' directions. One row per
network is kept in the results as soon as it is done, so a run that was cut short goes on; rows of other
settings are made anew. Also, on each pair: how the probes look to an API's owner, and side effects;
their intervals are over trainings.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from gradmark import ClassContrast, Ensemble, Marker, OwnerKey, __version__, catalog
from gradmark.audit.effects import side_effects
from gradmark.audit.population import features, judge_population
from gradmark.audit.queries import compare_queries
from gradmark.bench.networks import DigitsNet
from gradmark.codec import MarkFile, atomic_write
from gradmark.data import Data, load_data
from gradmark.demo.run import MARKER, RECIPE, SCHEME, SMOOTHING
from gradmark.embed import train
from gradmark.stats import mean_interval
from gradmark.suspects import ModuleSuspect
from gradmark.verify import verify

RESULTS = Path(__file__).parent / "results"
VARIANTS = {"default": SCHEME, "hidden": Ensemble((ClassContrast(),))}
FIRST_SEED = 50_000  # of seeds and keys that nothing else uses
INPUTS, QUERIES = 300, 2000


def settings(scheme: Ensemble, marker: dict[str, Any]) -> dict[str, Any]:
    """All that a row depends on."""
    made = {"scheme": scheme.name, "parameters": scheme.parameters(), "shares": scheme.shares, "marker": marker, "recipe": asdict(RECIPE), "smoothing": SMOOTHING,
            "inputs": INPUTS, "queries": QUERIES, "torch": torch.__version__}  # fmt: skip
    return json.loads(json.dumps(made))


def network(data: Data, seed: int, smoothing: float = SMOOTHING) -> nn.Module:
    """Unmarked, trained as the demo trains its own."""
    torch.manual_seed(seed)
    net = DigitsNet()
    train(net, data.to_train(), replace(RECIPE, seed=seed, smoothing=smoothing))
    return net.eval()


def marked_network(
    data: Data, seed: int, mark: Ensemble, marker: dict[str, Any]
) -> tuple[nn.Module, dict[str, float]]:
    """Marked, and the log10 p that its own key reads by either access."""
    key, control = OwnerKey.from_seed(seed), ModuleSuspect(network(data, seed, 0.0))
    scheme = mark.calibrated(key, data.spec, control, data.test.all())
    torch.manual_seed(seed)
    net = DigitsNet()
    train(net, data.to_train(), replace(RECIPE, seed=seed, smoothing=SMOOTHING),
          marker=Marker(scheme, key, data.spec, seed=seed, **marker))  # fmt: skip
    file = MarkFile.create(key, scheme.name, scheme.parameters(), data.spec, "signed-rank", 200)
    suspect, pool = ModuleSuspect(net.eval()), data.test.all()
    return net, {
        "white": verify(file, key, suspect, pool, access="white").log10_p,
        "black": verify(file, key, suspect, pool, access="black", queries=QUERIES).log10_p,
    }


def pair(
    data: Data, i: int, own: nn.Module, scheme: Ensemble, marker: dict[str, Any]
) -> list[dict[str, Any]]:
    """A marked network and an unmarked one of another seed, each as a row."""
    seed = FIRST_SEED + 2 * i
    net, log10_p = marked_network(data, seed, scheme, marker)
    nets = [ModuleSuspect(net), ModuleSuspect(network(data, seed + 1))]
    rows: list[dict[str, Any]] = []
    for n, suspect in enumerate(nets):
        seen = features(suspect.module, scheme, data.spec, data.test.batch(slice(0, INPUTS)), own)
        rows.append(
            {"seed": seed + n, "marked": n == 0, "settings": settings(scheme, marker), "features": seen}
        )
    rows[0]["log10_p"] = log10_p
    generator = torch.Generator().manual_seed(i)
    looks, _ = compare_queries(scheme, data.spec, nets[0], data.test.all(), QUERIES, generator)
    harm, _ = side_effects(*nets, data.test.all(), data.spec, generator)
    rows[0]["queries"] = {d.name: [d.auc, d.model, d.control] for d in looks}
    rows[0]["effects"] = {e.name: [e.model, e.control] for e in harm}
    return rows


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """AUCs over the population, the queries' AUCs and the side effects over pairs."""
    detectors = judge_population(
        [r["features"] for r in rows], [r["marked"] for r in rows], np.random.default_rng(0)
    )
    marked = [r for r in rows if r["marked"]]
    for name in marked[0]["queries"]:
        values = [r["queries"][name] for r in marked]
        scored = values[0][0] is not None
        numbers = [v[0] if scored else v[1] - v[2] for v in values]
        low, high = mean_interval(numbers)
        if scored:
            low, high = max(0.0, low), min(1.0, high)
        detectors.append({"name": name, "how": "mean over keys", "access": "black", "n_marked": len(marked),
                          "auc" if scored else "difference": float(np.mean(numbers)), "low": low, "high": high})  # fmt: skip
    effects = []
    for name in marked[0]["effects"]:
        two = np.array([r["effects"][name] for r in marked])
        low, high = mean_interval(two[:, 0] - two[:, 1])
        effects.append({"name": name, "model": two[:, 0].mean(), "control": two[:, 1].mean(),
                        "difference": (two[:, 0] - two[:, 1]).mean(), "low": low, "high": high, "pairs": len(two)})  # fmt: skip
    read = [r["log10_p"] for r in marked if "log10_p" in r]
    evidence = {way: float(np.median([r[way] for r in read])) for way in ("white", "black") if read}
    return {"detectors": detectors, "side_effects": effects, "median_log10_p": evidence}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pairs", type=int, default=40, help="marked networks, and as many unmarked")
    parser.add_argument("--variant", choices=VARIANTS, default="default")
    parser.add_argument("--strength", type=float, help="the Marker's, in place of its budget's")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    scheme, marker = VARIANTS[args.variant], {**MARKER, "new_heads": args.variant == "default"}
    name = "detect" if args.variant == "default" else f"detect-{args.variant}"
    if args.strength is not None:
        name, marker["strength"] = f"{name}-{args.strength:g}", args.strength
    args.out = args.out or RESULTS / f"{name}.json"
    torch.set_num_threads(1)
    catalog.scheme(scheme.name, scheme.parameters())  # what a mark file could name
    data, rows, own = load_data("digits"), [], None
    if args.out.exists():
        known = json.loads(args.out.read_text())["networks"]
        rows = [r for r in known if r["settings"] == settings(scheme, marker)]
    for i in range(args.pairs):
        if FIRST_SEED + 2 * i not in {r["seed"] for r in rows}:
            own = network(data, FIRST_SEED - 1) if own is None else own
            rows += pair(data, i, own, scheme, marker)
            save(args.out, {"networks": rows})
            print(f"pair {i + 1} of {args.pairs}", flush=True)
    chosen = [r for r in rows if r["seed"] < FIRST_SEED + 2 * args.pairs]
    found = summary(chosen)
    save(args.out, {**found, "version": __version__, "networks": rows})
    shown = found["detectors"]
    for d in [d for d in shown if d["how"] != "single feature"] + [
        d for d in shown if d["how"] == "single feature"
    ][:15]:
        print(
            f"{d['access']} {d['name']} ({d['how']}): {d.get('auc', d.get('difference')):.3f} [{d['low']:.3f}, {d['high']:.3f}]"
        )
    print("median log10 p", found["median_log10_p"])
    for e in found["side_effects"]:
        print(
            f"{e['name']}: {e['control']:.4f} -> {e['model']:.4f}, difference [{e['low']:+.4f}, {e['high']:+.4f}]"
        )


def save(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(path, (json.dumps(content, indent=1) + "\n").encode(), overwrite=True)


if __name__ == "__main__":
    main()
