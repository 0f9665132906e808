"""``docs/compatibility.md``, the part of training loops: every cell from a test or from ``overhead.py``.

    python benchmarks/compatibility.py          # writes the page from results/compatibility/trainers.json
    python benchmarks/compatibility.py --run    # runs the tests first

Only what lies between the page's two ``trainers`` comments is written; ``section`` serves other parts.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ET
from importlib.metadata import version
from pathlib import Path
from typing import Any

from gradmark import __version__

HERE = Path(__file__).parent
PAGE = HERE.parent / "docs" / "compatibility.md"
RESULTS = HERE / "results" / "compatibility" / "trainers.json"
FILES = ("preflight", "surroundings", "distributed", "integrations", "marker", "gpu")
LIBRARIES = ("torch", "transformers", "accelerate", "lightning", "peft")
NAMES = {
    "ddp": "DDP",
    "ddp-exact": "DDP, double backward",
    "ddp-static-graph": "DDP, `static_graph=True`",
    "ddp-compiled": "`torch.compile` around DDP",
    "ddp-checkpointing": "DDP, gradient checkpointing",
    "ddp-reentrant": "DDP, reentrant checkpointing",
    "ddp-ensemble": "DDP, the default scheme",
    "ddp-batch-norm": "DDP, batch norm in training, the penalty alone",
    "fsdp2": "FSDP2",
    "fsdp2-ensemble": "FSDP2, the default scheme",
    "fsdp1": "FSDP1",
}
LOOPS = {
    "transformers `Trainer`": "the_trainer_is_the_plain_loop",
    "`Trainer`, loss counted over all accumulated batches": "a_loss_counted_over_all_batches",
    "`Trainer`, evaluation between": "the_trainer_leaves_evaluation_alone",
    "`Trainer`, interrupted and resumed": "the_trainer_resumes",
    "Accelerate, float32 and bfloat16": "accelerate_is_the_plain_loop",
    "Accelerate, checkpoints": "accelerates_checkpoints",
    "Fabric, float32 and bfloat16": "fabric_is_the_plain_loop",
    "Lightning callback": "lightning_is_the_plain_loop",
    "Lightning, checkpoints": "lightnings_checkpoints",
    "Lightning, manual optimisation: refused": "manual_optimisation",
    "peft, LoRA: gradients by the chain rule": "adapters_get_the_gradient",
    "peft, LoRA: merged reads as unmerged": "a_merged_adapter",
}
PRECISIONS = {
    "bfloat16 autocast, float16 autocast: own gradient beside float64": "test_preflight.*autocast_passes",
    "bfloat16 autocast, both methods, training": "test_marker.*autocast_is_no_obstacle",
    "`GradScaler`": "test_marker.*scaled_losses",
    "gradient checkpointing": "test_preflight.*test_checkpointing",
    "gradient checkpointing, reentrant": "test_preflight.*reentrant_checkpointing_trains",
    "`torch.compile`, the whole model or a part": "test_preflight.*compiled_models",
    "DeepSpeed, engine and ZeRO-3 weights: refused": "test_preflight.*deepspeed",
    "fused attention on an accelerator": "test_gpu.*flash_attention",
    "cuDNN RNN": "test_gpu.*cudnn_rnn",
    "float16 with `GradScaler` on an accelerator": "test_gpu.*grad_scaler",
}


def run() -> None:
    """Run the tests, and keep each one's outcome and what it recorded."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        files = [str(HERE.parent / "tests" / f"test_{name}.py") for name in FILES]
        command = [sys.executable, "-m", "pytest", "-q", "-m", "not slow", f"--junitxml={report}", *files]
        subprocess.run(command, cwd=HERE.parent, check=False)
        cases = ET.parse(report).getroot().iter("testcase")
        tests = {f"{c.get('classname', '').rpartition('.')[2]}::{c.get('name')}": _told(c) for c in cases}
    versions = {name: version(name) for name in LIBRARIES}
    versions |= {"gradmark": __version__, "python": platform.python_version()}
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    RESULTS.write_text(json.dumps({"versions": versions, "tests": tests}, indent=1, sort_keys=True) + "\n")


def _told(case: ET.Element) -> dict[str, Any]:
    found: dict[str, Any] = {"outcome": "passed"}
    for outcome in ("failure", "error", "skipped"):
        if (node := case.find(outcome)) is not None:
            found = {"outcome": outcome, "reason": node.get("message", "")[:200]}
    kept = {p.get("name", ""): p.get("value", "") for p in case.iter("property")}
    return found | ({"recorded": kept} if kept else {})


def matching(tests: dict[str, Any], pattern: str) -> list[dict[str, Any]]:
    """The tests whose names hold every part of ``pattern``, in order."""
    parts = pattern.split(".*")
    return [row for name, row in tests.items() if all(part in name for part in parts)]


def cell(rows: list[dict[str, Any]]) -> str:
    """Passed, failed or not run, with numbers of tests."""
    if not rows:
        return "**no test**"
    bad = [r for r in rows if r["outcome"] in ("failure", "error")]
    if bad:
        return f"**{len(bad)} of {len(rows)} tests fail**: {bad[0]['reason']}"
    skipped = [r for r in rows if r["outcome"] == "skipped"]
    if skipped:
        why = skipped[0]["reason"].removeprefix("Skipped: ")
        return f"not run: {why}"
    return f"passes ({len(rows)} test{'s' if len(rows) > 1 else ''})"


def preflight(tests: dict[str, Any]) -> list[str]:
    lines = [
        "### Preflight: what is found in a model, and what is done about it",
        "",
        "Errors of the penalty's gradient: against a finite difference in float64, and (after the slash) of the model's own",
        "float32 gradient against the float64 one. `gradmark preflight` prints the same of your model.",
        "",
        "| model | found | central difference | double backward | gradmark |",
        "|---|---|---|---|---|",
    ]
    for name, row in tests.items():
        if "test_what_is_there_is_told_and_judged" not in name or "recorded" not in row:
            continue
        told = json.loads(row["recorded"]["report"])
        checks = [_check(c) for c in told["checks"]] or ["", ""]
        found = "; ".join(f["what"] for f in told["findings"])
        says = f"takes {told['method']}" if told["ok"] else f"refuses: {told['reason']}"
        cures = "; ".join(f["cure"] for f in told["findings"]) if told["ok"] else ""
        lines.append(
            f"| {_param(name)} | {found or 'nothing'} | {checks[0]} | {checks[1]} | {says}{'; ' if cures else ''}{cures} |"
        )
    return [*lines, ""]


def _check(check: dict[str, Any]) -> str:
    if check["error"] is None:
        return f"no: {check['reason']}"
    own = "" if check["own"] is None else f" / {check['own']:.0e}"
    return f"{'right' if check['ok'] else '**wrong**'}, {check['error']:.0e}{own}"


def _param(name: str) -> str:
    return name.partition("[")[2].removesuffix("]")


def distributed(tests: dict[str, Any]) -> list[str]:
    lines = [
        "### Several processes: two on gloo against one with the joint batch",
        "",
        "Greatest differences, relative to a tensor's greatest number; the test demands 1e-5 of gradients and 1e-4 of weights",
        "after a dozen steps, and that both processes keep the same running state bit for bit. The verdicts on DDP's and",
        "FSDP2's networks are those on one process's.",
        "",
        "| set-up | gradients of the first step | weights after 12 steps | gradmark |",
        "|---|---|---|---|",
    ]
    for case, name in NAMES.items():
        own = {n: r for n, r in tests.items() if n.endswith(f"[{case}]")}
        same = matching(own, "test_gradients_and_weights")
        refused = matching(own, "refused_with_the_reason")
        if refused:
            lines.append(f"| {name} | | | refuses: {refused[0]['recorded']['refusal']} |")
        elif same and "recorded" in same[0]:
            a, b = (float(same[0]["recorded"][n]) for n in ("gradients", "weights"))
            lines.append(f"| {name} | {a:.0e} | {b:.0e} | {cell([*own.values()])} |")
        else:
            lines.append(f"| {name} | | | {cell([*own.values()])} |")
    return [*lines, ""]


def listed(title: str, about: str, rows: dict[str, str], tests: dict[str, Any]) -> list[str]:
    lines = [f"### {title}", "", about, "", "| set-up | outcome |", "|---|---|"]
    return [*lines, *(f"| {name} | {cell(matching(tests, p))} |" for name, p in rows.items()), ""]


def overhead() -> list[str]:
    """The cost of the penalty, from ``overhead.py`` and ``cheap.py``."""
    rows = [json.loads(p.read_text()) for p in sorted((HERE / "results" / "overhead").glob("*.json"))]
    lines = [
        "### Cost of a training step with the default scheme",
        "",
        "Over a step without it; `overhead.py` says how it is measured. The aim is 1.10 in time and 1.15 in memory. The default is",
        "32 carriers on every 4th step. `ease=True` leaves out parts that are placed: the last column of time is after the filter",
        "and the triggers are, while the wrong classes still are pushed. `lean=True`, with `penalty` called before the task's",
        "forward pass, lets one graph go before the other is built. For batches of 8 the carriers are cut in proportion, to 2.",
        "",
        "| network | weights, millions | batch | time | time, ease, placed | memory | memory, lean |",
        "|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        cells = [f"{r['time'][s]['ratio']:.2f}" for s in ("default", "placed")]
        cells += [f"{r['memory'][s]['ratio']:.2f}" for s in ("default", "lean")]
        lines.append(f"| {r['network']} | {r['weights'] / 1e6:.1f} | {r['batch']} | {' | '.join(cells)} |")
    for r in rows:
        if "lean with preflight" in r["memory"]:
            peak = r["memory"]["lean with preflight"]["ratio"]
            lines += ["", f"The first call's preflight peaks at {peak:.2f} times a plain step's memory on {r['network']}: "
                      "it copies the weights in float64."]  # fmt: skip
    return [*lines, "", *evidence()]


def evidence() -> list[str]:
    rows = [json.loads(p.read_text()) for p in sorted((HERE / "results" / "cheap").glob("*.json"))]
    settings: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for r in rows:
        settings.setdefault((r["carriers"], r["every"], r["ease"]), []).append(r)
    lines = [
        "What a cheaper penalty leaves of the evidence, digits, 25 epochs (`cheap.py`): log10 p of each seed.",
        "",
        "| carriers, every | added to a step's 64 inputs | accuracy given up, points | white-box | black-box |",
        "|---|---|---|---|---|",
    ]
    for (carriers, every, ease), of in sorted(settings.items(), key=lambda kv: -kv[1][0]["rows"]):
        cost = [100 * (r["accuracy_control"] - r["accuracy_marked"]) for r in of]
        told = [", ".join(f"{r[a]['log10_p']:.0f}" for r in of) for a in ("white", "black")]
        given = ", ".join(f"{c:.2f}" for c in cost)
        lines.append(
            f"| {carriers}, {every}{', ease' if ease else ''} | {of[0]['rows']:.1f} | {given} | {told[0]} | {told[1]} |"
        )
    return [*lines, ""] if rows else []


def section(name: str, lines: list[str]) -> None:
    """Put ``lines`` between ``<!-- NAME -->`` and ``<!-- /NAME -->`` of the page, which must have both."""
    text = PAGE.read_text()
    start, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    head, _, rest = text.partition(start)
    _, found, tail = rest.partition(end)
    assert found, f"no {start} ... {end} in {PAGE}"
    PAGE.write_text(f"{head}{start}\n" + "\n".join(lines).strip() + f"\n{end}{tail}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", action="store_true")
    if parser.parse_args().run:
        run()
    told = json.loads(RESULTS.read_text())
    tests, versions = told["tests"], told["versions"]
    about = ", ".join(f"{name} {v}" for name, v in versions.items() if name != "gradmark")
    lines = [
        "## Training loops",
        "",
        f"Tested with {about}, on a CPU. Made by `python benchmarks/compatibility.py` from the tests' own records.",
        "",
        *preflight(tests),
        *distributed(tests),
        *listed(
            "Other people's loops",
            "Each trains the same network on the same batches as the plain loop, to the same losses and weights, with one and\n"
            "several batches a step; `examples/` has a program for each.",
            LOOPS,
            tests,
        ),
        *listed("Precision, memory, compilation", "On a CPU unless said otherwise.", PRECISIONS, tests),
        *overhead(),
    ]
    section("trainers", lines)


if __name__ == "__main__":
    main()
