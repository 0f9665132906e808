"""What the robustness benchmark shows: from its cells to one page.

    gradmark bench benchmarks/suites/digits.toml --out bench-out        (and the other suites there)
    python benchmarks/robustness.py bench-out ...

Writes results/robustness/cells.json (every cell, without what a summary doesn't need; networks that the folders don't
have keep the cells that they had), the pictures beside it, and ROBUSTNESS.md: every mark at a glance, and
per task what an embedding cost, every attack by every scheme, the cells that fall short, queries, and whether strangers'
p-values on attacked networks are uniform, and what the attacks are. Without an argument the page is made again from the committed cells.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from gradmark.bench.attacks import standard
from gradmark.catalog import FLAGSHIP
from gradmark.commands.attack import known_attacks
from gradmark.report.bench_plots import heatmap, pareto
from gradmark.stats import mean_interval

HERE = Path(__file__).parent
CELLS, PAGE = HERE / "results" / "robustness" / "cells.json", HERE / "ROBUSTNESS.md"
FRESH, PICTURE = CELLS.with_name("fresh.json"), CELLS.with_name("outlives.svg")
KEPT = ("task", "scheme", "flagship", "attack", "parameters", "seed", "access", "utility_control", "utility_marked",
        "utility_after", "stealing_loss", "log10_p", "match", "n_bits", "queries", "seconds", "removal",
        "wrong_key_log10_p", "versions", "error")  # fmt: skip
GOAL, WORTH = -6.0, 5.0
Cell = dict[str, Any]


def collect(out: Path) -> list[Cell]:
    """Every cell under ``out``, in a fixed order, numbers rounded to what they are worth."""
    rows = []
    for path in sorted((out / "cells").glob("*/*/*.json")):
        for cell in json.loads(path.read_text()):
            rows.append({k: _short(cell[k]) for k in KEPT if k in cell})
    return rows


def network(cell: Cell) -> tuple[Any, ...]:
    """Which marked network it is about: a network's cells are replaced together."""
    return cell["task"], cell["scheme"], cell["seed"]


def _place(cell: Cell) -> tuple[Any, ...]:
    return cell["task"], cell["scheme"], cell["attack"], cell["seed"], cell["access"]


def _short(value: Any) -> Any:
    if isinstance(value, float):
        return round(value, 3)
    return [_short(v) for v in value] if isinstance(value, list) else value


def page(cells: list[Cell]) -> Iterator[str]:
    yield "# Robustness\n"
    yield (
        "Made by `benchmarks/robustness.py` from `results/robustness/cells.json`; every cell comes from `gradmark bench` and a "
        "suite under `suites/`. A cell is *short* where log10 p is above -6 although the thief gave up 5 points of accuracy or less. "
        "The thief's loss may be negative: fine-tuning can improve a model. Medians over seeds, [the weakest seed].\n"
    )
    done = [c for c in cells if "error" not in c]
    yield from _glance(done)
    for task in dict.fromkeys(c["task"] for c in done):
        yield from _task(task, [c for c in done if c["task"] == task])
    yield from _strangers(done)
    yield from _named()
    failed = sorted({(c["task"], c["scheme"], c["attack"], c["error"]) for c in cells if "error" in c})
    if failed:
        yield "## Cells that could not be run\n"
        yield from _table(("task", "scheme", "attack", "why"), failed)


def _named() -> Iterator[str]:
    """What the attacks are, by their own docstrings, and the labels that they have here."""
    yield "## What the attacks are\n"
    yield (
        "`a+b` is b on what a made. `-lr3` is at three times the thief's own rate, `-owner` with the owner's optimizer and rate, "
        "`-sibling` by who has a network of all the owner's data, a number the amount. `gradmark attack --list` has the parameters.\n"
    )
    labels: dict[str, list[str]] = defaultdict(list)
    for one in standard():
        if "+" not in one.name:
            labels[one.name].append(f"`{one.label}`")
    rows = [
        (
            " ".join(labels.get(one.name, [f"`{one.name}`"])),
            one.what.replace("|", "/"),
            one.how.replace("|", "/"),
        )
        for one in known_attacks()
    ]
    yield from _table(("attack", "what it is", "what it does"), rows)


def _glance(cells: list[Cell]) -> Iterator[str]:
    yield "## At a glance\n"
    yield (
        "Per mark how many attacks remove it for 5 points or less on any seed; of the default (`ensemble`) and its variants also which, with the weakest seed. "
        "What a variant is says the suite that has its name.\n"
    )
    rows = []
    for task in dict.fromkeys(c["task"] for c in cells):
        of_task = [c for c in cells if c["task"] == task]
        for s in _schemes(of_task):
            own = [c for c in of_task if c["scheme"] == s]
            weakest = _weakest([c for c in own if c["removal"]])
            named = "; ".join(f"{a} {round(p, 1) + 0.0:.1f}" for a, p in sorted(weakest.items()))
            plain = " / ".join(_read(own, access) for access in ("white", "black"))
            attacks, costs = len({c["attack"] for c in own} - {"none"}), _costs(_utilities(own))
            rows.append((task, s, len(costs), mean_told(costs, 2), plain, f"{len(weakest)} of {attacks}", named if _ours(s) else ""))  # fmt: skip
    head = "task", "scheme", "seeds", "cost, mean [95 %]", "unattacked, with the weights / by queries", "removed by", "namely"  # fmt: skip
    yield from _table(head, rows)
    yield f"![After how many attacks each mark reads how strongly](results/robustness/{PICTURE.name})\n"


def _read(cells: list[Cell], access: str) -> str:
    p = [c["log10_p"] for c in cells if c["access"] == access and c["attack"] == "none"]
    return _evidence(p) if p else "-"


def _evidence(p: list[float]) -> str:
    """The median of log10 p over seeds, and the weakest where there are several."""
    return f"{np.median(p):.1f}" + (f" [{max(p):.1f}]" if len(p) > 1 else "")


def _weakest(cells: list[Cell]) -> dict[str, float]:
    """By attack the highest log10 p of any seed and access."""
    found: dict[str, float] = {}
    for c in cells:
        found[c["attack"]] = max(c["log10_p"], found.get(c["attack"], -np.inf))
    return found


def _schemes(cells: list[Cell]) -> list[str]:
    """The default first."""
    return sorted({c["scheme"] for c in cells}, key=lambda s: (s != FLAGSHIP, s))


def _ours(scheme: str) -> bool:
    """Whether it is the default or a variant of it."""
    return scheme.startswith(FLAGSHIP)


def _utilities(cells: list[Cell]) -> list[tuple[float, float]]:
    """The control's and the marked network's, of one scheme's seeds."""
    return list({c["seed"]: (c["utility_control"], c["utility_marked"]) for c in cells}.values())


def _costs(utilities: list[tuple[float, float]]) -> list[float]:
    return [control - marked for control, marked in utilities]


def _task(task: str, cells: list[Cell]) -> Iterator[str]:
    schemes = _schemes(cells)
    yield f"## {task}\n"
    for picture in (f"heatmap-{task}.png", f"pareto-{task}.png"):
        yield f"![{picture}](results/robustness/{picture})\n"
    yield "What embedding cost, in points of accuracy against an unmarked control of the same seed:\n"
    rows = []
    for s in schemes:
        pairs = _utilities([c for c in cells if c["scheme"] == s])
        mean = [float(np.mean(column)) for column in zip(*pairs, strict=True)]
        rows.append((s, len(pairs), f"{mean[0]:.2f}", f"{mean[1]:.2f}", mean_told(_costs(pairs), 2)))
    yield from _table(("scheme", "seeds", "control", "marked", "cost, mean [95 %]"), rows)
    for access in ("white", "black"):
        yield from _attacks(access, [c for c in cells if c["access"] == access], schemes)
    yield from _shortfalls(cells, schemes)
    yield from _beside(cells, "ensemble", "gradsigns")


def _attacks(access: str, cells: list[Cell], schemes: list[str]) -> Iterator[str]:
    shown = [s for s in schemes if any(c["scheme"] == s for c in cells)]
    spent = {s: sorted({c["queries"] for c in cells if c["scheme"] == s}) for s in shown}
    words = "weights at hand" if access == "white" else "through queries: " + ", ".join(
        f"{s} {q[0]}" if len(q) == 1 else f"{s} {q[0]} to {q[-1]}" for s, q in spent.items()
    )  # fmt: skip
    yield f"### {task_words(access)} ({words})\n"
    rows = []
    for attack in dict.fromkeys(
        c["attack"] for c in sorted(cells, key=lambda c: (c["attack"] != "none", c["attack"]))
    ):
        row = [attack]
        for s in shown:
            found = [c for c in cells if c["attack"] == attack and c["scheme"] == s]
            row.append(_entry(found) if found else "")
        rows.append(row)
    yield from _table(("attack", *(f"{s}: log10 p, loss" for s in shown)), rows)


def task_words(access: str) -> str:
    return "White-box" if access == "white" else "Black-box"


def _entry(cells: list[Cell]) -> str:
    text = _evidence([c["log10_p"] for c in cells])
    loss = float(np.median([c["stealing_loss"] for c in cells]))
    return f"**{text}**, {loss:+.1f}" if any(c["removal"] for c in cells) else f"{text}, {loss:+.1f}"


def _shortfalls(cells: list[Cell], schemes: list[str]) -> Iterator[str]:
    yield "### Cells that fall short\n"
    rows = []
    for s in schemes:
        own = [c for c in cells if c["scheme"] == s]
        worth = [c for c in own if c["stealing_loss"] <= WORTH]
        short = [c for c in own if c["removal"]]
        named = {}
        for c in short:
            named.setdefault((c["attack"], c["access"]), []).append(c["log10_p"])
        text = "; ".join(
            f"{a} ({w}) {', '.join(f'{p:.1f}' for p in ps)}" for (a, w), ps in sorted(named.items())
        )
        rows.append((s, len(own), len(worth), len(short), text if len(text) < 1500 else text[:1500] + " ..."))
    yield from _table(
        ("scheme", "cells", "with a loss of 5 or less", "short", "which, with log10 p of each seed"), rows
    )
    yield from _fresh([c for s in schemes if _ours(s) for c in cells if c["scheme"] == s and c["removal"]])


def _fresh(short: list[Cell]) -> Iterator[str]:
    """What removing the default scheme's mark, or a variant's, leaves beside what its thief can have without stealing."""
    known = json.loads(FRESH.read_text()) if short and FRESH.exists() else {}
    anew = {int(seed): value for seed, value in known.get(short[0]["task"], {}).items()} if known else {}
    if not anew:
        return
    yield (
        "What these attacks leave beside what the thief can have without stealing: a network that he trains anew by the owner's recipe on the third of the "
        f"training data that is his reaches {mean_told(list(anew.values()))} % ({len(anew)} seeds, `fresh.py`). Means [95 %].\n"
    )
    left: dict[tuple[str, str], dict[int, float]] = {}
    for c in short:
        if c["seed"] in anew:
            left.setdefault((c["scheme"], c["attack"]), {})[c["seed"]] = c["utility_after"]
    rows = [
        (
            *named,
            len(own),
            mean_told(list(own.values())),
            mean_told([v - anew[seed] for seed, v in own.items()], sign="+"),
        )
        for named, own in left.items()
    ]
    head = "scheme", "attack", "seeds where it removes the mark", "left", "over a network of his own"
    yield from _table(head, rows)


def mean_told(values: list[float], digits: int = 1, sign: str = "") -> str:
    """With its interval where there are several."""
    ends = mean_interval(values) if len(values) > 1 else ()
    spread = f" [{', '.join(f'{v:.{digits}f}' for v in ends)}]" if ends else ""
    return f"{np.mean(values):{sign}.{digits}f}{spread}"


def _beside(cells: list[Cell], ours: str, theirs: str) -> Iterator[str]:
    """Cell by cell, where both were read on the same seed: how often ours is as strong, and the exceptions."""
    pairs: dict[tuple[Any, ...], dict[str, Cell]] = {}
    for c in cells:
        pairs.setdefault((c["attack"], c["access"], c["seed"]), {})[c["scheme"]] = c
    both = {k: v for k, v in pairs.items() if ours in v and theirs in v}
    if not both:
        return
    weaker = {k: v for k, v in both.items() if v[ours]["log10_p"] > v[theirs]["log10_p"]}
    asked = [v for (_, access, _), v in both.items() if access == "black"]
    rate = {
        s: np.median([v[s]["log10_p"] / v[s]["queries"] for v in asked if v[s]["queries"]])
        for s in (ours, theirs)
    }
    yield f"### Beside {theirs}, cell by cell\n"
    yield (
        f"{len(both)} cells of the same attack, access and seed (the same thief, of networks marked by one scheme each): {ours} is at least as strong in "
        f"{len(both) - len(weaker)}. Black-box, log10 p per query, median: {ours} {rate[ours]:.4f}, {theirs} {rate[theirs]:.4f}.\n"
    )
    if weaker:
        rows = [
            (a, w, n, *(f"{v[s]['log10_p']:.1f}, {v[s]['stealing_loss']:+.1f}" for s in (ours, theirs)))
            for (a, w, n), v in sorted(weaker.items())
        ]
        yield "The others, with the thief's loss:\n"
        yield from _table(("attack", "access", "seed", ours, theirs), rows)


def _strangers(cells: list[Cell]) -> Iterator[str]:
    yield "## Strangers' keys on attacked networks\n"
    yield (
        "On every attacked network the p-values of keys that were never embedded. At most 5 % may be at or below .05 and 1 % at or below "
        ".01, up to chance. The same few keys, two to four a seed, are read again and again in networks that differ little, so a whole row stands and falls with "
        "one key, and its share scatters far more than so many independent p-values would; `README.md` has the test with 200 keys a network.\n"
    )
    rows = []
    for task in dict.fromkeys(c["task"] for c in cells):
        for s in sorted({c["scheme"] for c in cells if c["task"] == task}):
            p = [
                10**v for c in cells if c["task"] == task and c["scheme"] == s for v in c["wrong_key_log10_p"]
            ]
            if p:
                a = np.array(p)
                rows.append(
                    (
                        task,
                        s,
                        len(a),
                        f"{(a <= 0.05).mean():.3f}",
                        f"{(a <= 0.01).mean():.3f}",
                        f"{np.log10(a.min()):.1f}",
                    )
                )
    yield from _table(("task", "scheme", "p-values", "share <= .05", "share <= .01", "least log10 p"), rows)


def _table(head: Iterable[str], rows: Iterable[Iterable[Any]]) -> Iterator[str]:
    head = list(head)
    yield "| " + " | ".join(head) + " |"
    yield "|" + "---|" * len(head)
    yield from ("| " + " | ".join(str(v) for v in row) + " |" for row in rows)
    yield ""


NAMES = {
    "ensemble": "gradmark, the default", "ensemble+whole": "gradmark, all parts", "gradsigns": "GradSigns (2021)", "probe-gradient": "local probes (as EaaW, 2025)",
    "weights": "weights (as Uchida, 2017)", "trigger": "trigger set (as Adi, 2018)", "margin-trigger": "margin-based trigger set",
}  # fmt: skip
TITLES = {
    "digits": "digits, the weakest of 5 seeds",
    "cifar10": "ResNet-20, CIFAR-10, the weakest of 3 seeds (of others' marks one)",
}


def outlives(cells: list[Cell]) -> bytes:
    """Per mark the share of attacks, of those at most 5 points dear, after which its weakest reading is at or below a log10 p.

    Of attacks that were run of all marks; of query-side ones, of those that can be asked.
    """
    from gradmark.report.canvas import CYCLE, canvas

    done = [c for c in cells if "error" not in c and c["attack"] != "none"]
    with canvas(10.4, 3.9, columns=2) as c:
        for axes, (task, title) in zip(c.axes[0], TITLES.items(), strict=True):
            own = {s: [cell for cell in done if (cell["task"], cell["scheme"]) == (task, s)] for s in NAMES}
            asked = [of for of in own.values() if any(cell["access"] == "black" for cell in of)]
            common = set.intersection(*({cell["attack"] for cell in of} for of in asked))
            for i, (scheme, name) in enumerate(NAMES.items()):
                worth = [v for v in own[scheme] if v["attack"] in common and v["stealing_loss"] <= WORTH]
                p = np.sort(list(_weakest(worth).values()))
                if not len(p):
                    continue
                share = 100 * np.arange(1, len(p) + 1) / len(p)
                style = (
                    {"linestyle": "-", "linewidth": 2.2}
                    if _ours(scheme)
                    else {"linestyle": "--", "linewidth": 1.3}
                )
                style["color"] = CYCLE[i % len(CYCLE)]
                axes.step([-200, *p, 0], [0, *share, share[-1]], where="post", label=name, **style)
            axes.axvline(GOAL, color="#111827", linewidth=1, linestyle=":")
            axes.text(GOAL - 0.8, 4, "p = 1e-6", ha="right", fontsize=8, bbox={"color": "white", "pad": 1})
            axes.set(
                xlim=(-100, 0), ylim=(0, 101), xlabel="log10 p (stronger evidence to the left)", title=title
            )
        c.axes[0][0].set(ylabel="attacks after which the mark reads so, %")
        c.axes[0][1].legend(*c.axes[0][0].get_legend_handles_labels(), fontsize=8, loc="upper left")
    return c.data


def pictures(cells: list[Cell]) -> Iterator[tuple[str, bytes]]:
    """Per task a heat map of every scheme and attack, and the thief's front against the default alone."""
    for task in dict.fromkeys(c["task"] for c in cells):
        own = [c for c in cells if c["task"] == task]
        schemes = _schemes(own)
        own.sort(key=lambda c: (schemes.index(c["scheme"]), c["attack"] != "none", c["access"] != "white"))
        yield f"heatmap-{task}.png", heatmap(own, task, removed=GOAL, worth=WORTH).svg_or_png
        default = [c for c in own if c["scheme"] == FLAGSHIP] or own
        yield f"pareto-{task}.png", pareto(default, task, removed=GOAL, worth=WORTH).svg_or_png


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", nargs="*", type=Path, help="benchmarks' folders, to take their cells")
    args = parser.parse_args()
    if args.out:
        CELLS.parent.mkdir(parents=True, exist_ok=True)
        fresh = [cell for out in args.out for cell in collect(out)]
        known = json.loads(CELLS.read_text()) if CELLS.exists() else []
        made = {network(cell) for cell in fresh}
        cells = sorted(fresh + [cell for cell in known if network(cell) not in made], key=_place)
        CELLS.write_text("[\n" + ",\n".join(json.dumps(c) for c in cells) + "\n]\n")
    cells = json.loads(CELLS.read_text())
    PICTURE.write_bytes(outlives(cells))
    for name, data in pictures([cell for cell in cells if "error" not in cell]):
        CELLS.with_name(name).write_bytes(data)
    PAGE.write_text("\n".join(page(cells)))


if __name__ == "__main__":
    main()
