"""Turn results/ into RESULTS.md and front.svg: every number there comes from a JSON file beside it.

python benchmarks/tables.py
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from gradmark.stats import mean_interval, wilson_interval

HERE = Path(__file__).parent
RESULTS = HERE / "results"
SIDES = {
    "control": "unmarked control, 20 epochs from scratch",
    "scratch": "marked from scratch, same schedule",
    "after-control": "control trained on for 2 epochs, unmarked",
    "after": "control marked afterwards, 2 epochs",
}


def rows(folder: str) -> list[dict[str, Any]]:
    return [json.loads(p.read_text()) for p in sorted((RESULTS / folder).glob("*.json"))]


def interval(values: list[float], digits: int = 2) -> str:
    """Mean and its 95 % Student interval; a lone value stands alone."""
    mean = sum(values) / len(values)
    if len(values) < 2:
        return f"{mean:.{digits}f} (1 seed)"
    low, high = mean_interval(values)
    return f"{mean:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def evidence(cells: list[dict[str, Any]], access: str) -> str:
    """Median and weakest log10 p over seeds and the five disjoint sets of 200 test carriers."""
    p = sorted(v["log10_p"] for c in cells for v in c["verdicts"] if v["access"] == access)
    return f"{p[len(p) // 2]:.1f} (weakest {p[-1]:.1f}, n = {len(p)})"


def cifar() -> list[str]:
    cells = rows("cifar10")
    by: dict[str, dict[int, dict[str, Any]]] = {}
    for c in cells:
        by.setdefault(c["name"], {})[c["seed"]] = c
    lines = [
        "## CIFAR-10 (JPEG copy), ResNet-20",
        "",
        "| | seeds | accuracy % | log10 p white-box, 200 carriers | log10 p black-box, 2,000 queries, 8-bit inputs |",
        "|---|---|---|---|---|",
    ]
    for name, words in SIDES.items():
        of = list(by.get(name, {}).values())
        if of:
            accuracy = interval([100 * c["accuracy"] for c in of])
            lines.append(
                f"| {words} | {len(of)} | {accuracy} | {evidence(of, 'white')} | {evidence(of, 'black')} |"
            )
    lines += ["", "Accuracy given up, in points, seed by seed against the control on the same schedule:", ""]
    for marked, control in (("scratch", "control"), ("after", "after-control")):
        both = sorted(set(by.get(marked, {})) & set(by.get(control, {})))
        if both:
            cost = [100 * (by[control][s]["accuracy"] - by[marked][s]["accuracy"]) for s in both]
            lines.append(
                f"- {SIDES[marked]}: {interval(cost)} ({', '.join(f'seed {s}: {c:.2f}' for s, c in zip(both, cost, strict=True))})"
            )
    lines += [
        "",
        "### The front: strength against evidence (seed 0, marked afterwards)",
        "",
        "| budget | accuracy % | points given up | log10 p white-box | log10 p black-box |",
        "|---|---|---|---|---|",
    ]
    points = []
    for name, of in by.items():
        if 0 in of and (name.startswith("front-") or name in ("after", "after-control")):
            budget = (
                {"after": 0.5, "after-control": 0.0}.get(name)
                if not name.startswith("front-")
                else float(name[6:])
            )
            points.append((float(budget or 0), of[0]))
    points.sort(key=lambda p: p[0])
    base = by.get("after-control", {}).get(0)
    for budget, c in points:
        lost = f"{100 * (base['accuracy'] - c['accuracy']):.2f}" if base else "?"
        lines.append(
            f"| {budget or 'unmarked'} | {100 * c['accuracy']:.2f} | {lost} | {evidence([c], 'white')} | {evidence([c], 'black')} |"
        )
    draw(points)
    return [*lines, "", "![accuracy against evidence over the strength](results/front.svg)", ""]


def draw(points: list[tuple[float, dict[str, Any]]]) -> None:
    figure = Figure(figsize=(6.4, 4), layout="constrained")
    FigureCanvasSVG(figure)
    axes = figure.subplots()
    for access, marker in (("white", "o"), ("black", "s")):
        x = [sum(v["log10_p"] for v in c["verdicts"] if v["access"] == access) / 5 for _, c in points]
        y = [100 * c["accuracy"] for _, c in points]
        axes.plot(x, y, marker=marker, label=f"{access}-box")
        for (budget, _), a, b in zip(points if access == "white" else [], x, y, strict=False):
            axes.annotate(
                f"{budget:g}" if budget else "unmarked",
                (a, b),
                textcoords="offset points",
                xytext=(5, 5),
                fontsize=8,
            )
    axes.axvline(-6, linestyle=":", color="grey", label="alpha = 1e-6")
    axes.invert_xaxis()
    axes.set(
        xlabel="log10 p, mean of 5 sets of carriers (stronger evidence to the right)",
        ylabel="test accuracy %",
        title="Labels: accuracy budget in points",
    )
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(RESULTS / "front.svg", metadata={"Date": None})


def innocents() -> list[str]:
    lines = [
        "## Innocent until proven: 1,000 keys that were embedded nowhere, white-box",
        "",
        "| network | Kolmogorov-Smirnov p | p <= .05 | strongest log10 p | claims at 1e-6 |",
        "|---|---|---|---|---|",
    ]
    for r in rows("innocents"):
        low, high = r["below_05_95"]
        lines.append(
            f"| {r['network']} | {r['ks_p']:.3f} | {r['below_05']:.3f} [{low:.3f}, {high:.3f}] | {r['smallest_log10_p']:.1f} | {r['claims_at_1e-6']} |"
        )
    of = rows("innocents")
    keys = sum(r["keys"] for r in of)
    below = sum(round(r["below_05"] * r["keys"]) for r in of)
    low, high = wilson_interval(below, keys)
    lines += [
        "",
        f"All together: {below} of {keys} p-values at or below .05, {below / keys:.4f} [{low:.4f}, {high:.4f}].",
    ]
    return [*lines, ""]


def digits() -> list[str]:
    lines = [
        "## Digits, 5 seeds",
        "",
        "| track | points given up | log10 p white-box | log10 p black-box, 2,000 queries | innocents' strongest log10 p |",
        "|---|---|---|---|---|",
    ]
    for track in ("cnn", "mlp"):
        of = [r for r in rows("digits") if r["track"] == track]
        cost = interval([100 * (r["accuracy_control"] - r["accuracy_marked"]) for r in of])
        p = {a: sorted(r[f"owner, {a}"]["log10_p"] for r in of) for a in ("white", "black")}
        worst = min(
            r[f"{who}, {a}"]["log10_p"]
            for r in of
            for who in ("control", "wrong key")
            for a in ("white", "black")
        )
        cells = [f"{v[len(v) // 2]:.1f} (weakest {v[-1]:.1f})" for v in p.values()]
        lines.append(f"| {track} | {cost} | {cells[0]} | {cells[1]} | {worst:.1f} |")
    return [*lines, ""]


def ablation() -> list[str]:
    path = RESULTS / "ablation.json"
    if not path.exists():
        return []
    lines = [
        "## What the design rests on (digits, 3 seeds, held-out part of the training split)",
        "",
        "| change | accuracy % | log10 p white | log10 p black | mean reading, logits |",
        "|---|---|---|---|---|",
    ]
    for name, r in json.loads(path.read_text())["rows"].items():
        cells = [
            f"{r[k]['mean']:.2f} [{r[k]['95'][0]:.2f}, {r[k]['95'][1]:.2f}]"
            for k in ("accuracy", "white log10 p", "black log10 p", "white mean reading")
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    path = RESULTS / "ablation-resnet.json"
    if path.exists():
        table = json.loads(path.read_text())
        lines += ["", "ResNet-20 on CIFAR-10, 120 marked steps of control 0 (1 seed):", ""]
        head = next(iter(table.values()))
        lines += [f"| | {' | '.join(head)} |", "|---|" + "---|" * len(head)]
        for name, r in table.items():
            cells = ["diverged"] * len(head) if "diverged" in r else [f"{v:.2f}" for v in r.values()]
            lines.append(f"| {name} | {' | '.join(cells)} |")
    return [*lines, ""]


def cost() -> list[str]:
    path = RESULTS / "cost.json"
    if not path.exists():
        return []
    table = json.loads(path.read_text())
    lines = [
        "## Cost: seconds over the plain side, same run, interleaved; median [quartiles]",
        "",
        "| | ratio |",
        "|---|---|",
    ]
    for part in ("training", "verification, 200 carriers"):
        for name, r in table[part].items():
            lines.append(f"| {part}: {name} | {r['median']:.2f} [{r['low']:.2f}, {r['high']:.2f}] |")
    return [*lines, ""]


def main() -> None:
    head = [
        "# Measured",
        "",
        "Made by `python benchmarks/tables.py` from the JSON files under `results/`; `README.md` here says how each",
        "is made. Intervals are 95 %. log10 p is exact and one-sided; lower is stronger evidence.",
        "",
    ]
    body = [*cifar(), *innocents(), *digits(), *ablation(), *cost()]
    (HERE / "RESULTS.md").write_text("\n".join(head + body).rstrip() + "\n")


if __name__ == "__main__":
    main()
