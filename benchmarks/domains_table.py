"""DOMAINS.md: the numbers of benchmarks/domains.py, as tables."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gradmark.files import atomic_write
from gradmark.stats import mean_interval

if TYPE_CHECKING:
    from domains import Domain

TABLE = Path(__file__).parent / "DOMAINS.md"


def table(domains: dict[str, Domain], results: Path) -> None:
    """DOMAINS.md from the results."""
    found = [json.loads(p.read_text()) for p in sorted(results.glob("*-*.json"))]
    of = {n: sorted((r for r in found if r["domain"] == n), key=lambda r: r["seed"]) for n in domains}
    of = {name: rows for name, rows in of.items() if rows}
    text = ["# The mark in six domains", "", INTRODUCTION, "", "## Evidence and price", ""]
    text += ["| task | utility | control | marked | difference | mark | access | queries | log10 p, each seed | control's |", "|---|---|---|---|---|---|---|---|---|---|"]  # fmt: skip
    for name, rows in of.items():
        its = domains[name].parts.items()
        text += [_line(domains[name], rows, p, access) for p, part in its for access in part.access]
    text += ["", "## What else the field asks", "", DETAILS, "", "| task | measure | control | marked | difference |", "|---|---|---|---|---|"]  # fmt: skip
    for name, rows in of.items():
        text += _detail_lines(domains[name], rows)
    text += ["", "## Can it be seen or heard?", "", QUIET, "", "| task | mark | nudge | dB | through the API: log10 p, each seed |", "|---|---|---|---|---|"]  # fmt: skip
    for name, rows in of.items():
        text += _quiet_lines(name, rows)
    text += ["", "## Strangers' keys", "", "Keys never embedded, in the first seed's marked network: shares of p-values at or below .05 and .01.", "", "| task | mark | access | keys | .05 | .01 | KS p |", "|---|---|---|---|---|---|---|"]  # fmt: skip
    for name, rows in of.items():
        by = ((p, a, w) for r in rows for p, ways in r.get("strangers", {}).items() for a, w in ways.items())
        text += [f"| {name} | {p} | {a} | {w['keys']} | {w['share_0.05']:.3f} | {w['share_0.01']:.3f} | {w['ks_p']:.2f} |" for p, a, w in by]  # fmt: skip
    text += ["", "## Attacks", "", "Utility after the attack (mean), and log10 p: median [weakest] over the seeds.", "", "| task | attack | seeds | utility | log10 p |", "|---|---|---|---|---|"]  # fmt: skip
    for name, rows in of.items():
        text += _attack_lines(name, domains[name], rows)
    atomic_write(TABLE, "\n".join([*text, ""]).encode(), overwrite=True)


INTRODUCTION = """\
Made by `python benchmarks/domains.py --table` from `results/domains`. Eight seeds of each task, 0 to 7 (the last five by `--seeds 3 4 5 6 7
--only evidence`), attacks and quieter readings on the first three; 200 carriers. From a network trained without a mark two are tuned on one schedule and the same batches: control and marked. With faces a seed is also a split of
the people (ORL at 28 x 23 pixels), with spoken digits (`speech`) and digit strings (`transcription`) one speaker is unheard.
Means over seeds; differences with 95 % intervals (t), in points, or in percent of the controls' mean for word error rate and perplexity."""
DETAILS = """\
Of faces, on pairs of people whom no training saw: `tar` is the share of genuine pairs accepted where one impostor pair in a thousand
is, `worst` the cosine of the likest impostor pair, `identified` open-set identification at one false alarm in a hundred;
`strangers_far` is the share of pairs with enrolled strangers that pass `tar`'s threshold."""


QUIET = """\
Decibels between an input and what the filter mark adds to it, as the API gets it (median over inputs, mean over seeds). The mark
was trained with a nudge of 1; the same mark is read with smaller ones. Of an ensemble the filter part alone is read here. An equaliser's
nudge of 1 moves each frequency's gain by .9 decibels (root mean square; up to 3), smaller ones by as much less. Transcription
is read with a nudge of .1 elsewhere in this file (`reading_step`).
Faces have 8 bits, which round a nudge of .03 to nothing."""


def _quiet_lines(name: str, rows: list[dict[str, Any]]) -> list[str]:
    """A line for each size of the nudge; of what wasn't read again, the decibels alone."""
    first = next((r["quiet"] for r in rows if "quiet" in r), None)
    if first is None:
        means = {p: statistics.mean(r["snr_db"][p] for r in rows) for p in rows[0].get("snr_db", {})}
        return [f"| {name} | {p} | 1 | {db:.1f} | not read again |" for p, db in means.items()]
    lines = []
    for at in first:
        same = [
            q
            for r in rows
            for q in r.get("quiet", [])
            if (q["mark"], q["factor"]) == (at["mark"], at["factor"])
        ]
        found = []
        for access in at["log10_p"]:
            ps = ", ".join(f"{q['log10_p'][access]:.1f}" for q in same)
            found.append(f"{access}: {ps}")
        db = statistics.mean(q["db"] for q in same)
        lines.append(f"| {name} | {at['mark']} | {at['factor']:g} | {db:.1f} | {'; '.join(found)} |")
    return lines


def _compared(pairs: list[tuple[float, float]], relative: bool, digits: int) -> str:
    """Control, marked and the difference as table cells; the relative one is of the controls' mean, since single
    word error rates near nothing make ratios of any size."""
    middle = [statistics.mean(v) for v in zip(*pairs, strict=True)]
    change = [(m - c) * (100 / middle[0] if relative else 1) for c, m in pairs]
    unit, d = (" %", 2) if relative else ("", digits)
    spread = ""
    if len(change) > 1:
        low, high = mean_interval(change)
        spread = f" [{low:.{d}f}, {high:.{d}f}]"
    return f"{middle[0]:.{digits}f} | {middle[1]:.{digits}f} | {statistics.mean(change):+.{d}f}{unit}{spread}"


def _line(domain: Domain, rows: list[dict[str, Any]], part: str, access: str) -> str:
    pairs = [(r["utility"]["control"], r["utility"]["marked"]) for r in rows]
    utility = _compared(pairs, domain.headline in RELATIVE, 2)
    at = [v for r in rows for v in r["verdicts"] if v["mark"] == part and v["access"] == access]
    marked, control = ([v for v in at if v["network"] == kind] for kind in ("marked", "control"))
    ps, innocent = (", ".join(f"{v['log10_p']:.1f}" for v in some) for some in (marked, control))
    return f"| {rows[0]['domain']} | {domain.label} | {utility} | {part} | {access} | {marked[0]['queries'] or ''} | {ps} | {innocent} |"


RELATIVE = ("perplexity", "word_error_rate")


def _detail_lines(domain: Domain, rows: list[dict[str, Any]]) -> list[str]:
    lines = []
    for measure in rows[0]["details"]["control"]:
        pairs = [(r["details"]["control"][measure], r["details"]["marked"][measure]) for r in rows]
        relative = domain.headline in RELATIVE
        digits = 2 if max(max(pair) for pair in pairs) > 2 else 4
        lines.append(f"| {rows[0]['domain']} | {measure} | {_compared(pairs, relative, digits)} |")
    return lines


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
            found.append(f"{mark}, {access}: {statistics.median(ps):.1f} [{max(ps):.1f}]")
        utility = statistics.mean(c["utility"] for c in good)
        lines.append(f"| {name} | {label} | {len(good)} | {utility:.2f} | {'; '.join(found)} |")
    return lines
