"""``docs/compatibility.md``: every cell from a test, from ``overhead.py``, ``cheap.py`` or ``queries.py``.

    python benchmarks/compatibility.py                           # writes the page from results/compatibility
    python benchmarks/compatibility.py --run trainers endpoints  # runs these tests first
    python benchmarks/compatibility.py --run accelerator         # the same, where there is one

Only what lies between the page's ``trainers`` and ``endpoints`` comments is written.
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ET
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from gradmark import __version__

HERE = Path(__file__).parent
PAGE = HERE.parent / "docs" / "compatibility.md"
RESULTS = HERE / "results" / "compatibility"
FILES = {
    "trainers": ("preflight", "surroundings", "distributed", "integrations", "marker"),
    "accelerator": ("gpu",),
    "endpoints": (
        "suspects/apis",
        "suspects/http",
        "suspects/files",
        "suspects/onnx",
        "suspects/stored",
        "sequential",
    ),
}
LIBRARIES = {
    "trainers": ("torch", "transformers", "accelerate", "lightning", "peft"),
    "accelerator": ("torch",),
    "endpoints": (
        "torch",
        "httpx2",
        "tenacity",
        "fastapi",
        "onnxruntime",
        "tritonclient",
        "safetensors",
        "gguf",
        "torchao",
    ),
}
SPOKEN = {
    "plain JSON, whatever form of answer `docs/formats.md` has": "test_http.*every_documented_answer",
    "mapped JSON: base64 PNGs in, probabilities by class name, the top 3, or the label out": "images_in_and_class_names_out",
    "mapped JSON: one input a request, raw bytes": "one_input_a_request_in_raw_bytes",
    "mappings without sense: refused": "mappings_without_sense",
    "Open Inference Protocol v2, JSON and binary tensors, FP32, FP64, UINT8, free and fixed batches": "test_the_open_inference_protocol",
    "the same server asked by the official client (tritonclient)": "is_one_to_its_official_client",
    "a model whose inputs don't fit: refused": "oip_models_that_dont_fit",
    "OpenAI-compatible completions and chats with log-probabilities, and echo": "candidates_and_the_prompts_own",
    "a classifier made of a prompt": "a_prompted_classifier",
    "completions without log-probabilities: refused": "answers_without_probabilities",
}
KEPT = {
    "float32 arrives bit for bit, in any batches, 1 or 4 at once": "float32_survives",
    "429 and 5xx and broken connections are tried again": "passing_failures_are_retried",
    "`Retry-After`, seconds or a date, up to a minute": "retry_after_is_obeyed",
    "timeouts": "a_timeout_is_retried",
    "it gives up in the end, with the last reason": "gives_up_with_the_last_reason",
    "other statuses end the run: refused": "other_statuses_fail_at_once",
    "nonsense in the answers: refused": "nonsense_is_refused_and_not_retried",
    "rate and budget: refused beyond": "the_rate_and_the_budget_are_kept",
    "an interrupted run asks nothing twice": "an_interrupted_run_asks_nothing_twice",
    "a torn line of the journal is asked again": "a_torn_last_line",
    "the journal under several requests at once": "a_journal_works_under_concurrency",
    "answers of another endpoint, API or shape aren't reused": "not_reused",
    "credentials appear nowhere": "holds_no_secret",
}
OPENED = {
    "`.pt2`, white-box": "test_files.*an_exported_file",
    "`.pt2` of 13 networks of others": "every_shared_network",
    "`.pt2`, hostile archives: refused": "hostile_archives",
    "`.safetensors` with `--model`": "test_files.*weights_round_trip",
    "`.safetensors.index.json`, several files": "shards_read_as_one",
    "an index that lies, or a damaged file: refused": "a_damaged_shard",
    "`.gguf`, F32, F16, BF16, Q8_0, with `--model`": "gguf_reads_as_what_was_written",
    "`.gguf` of another architecture, or under other names: refused": "gguf_of_another_architecture",
    "`.gguf`, cut or changed: refused": "test_cut_and_changed_gguf",
    "`.pt`, a state dict of tensors (`weights_only=True`)": "a_pickled_state_dict",
    "`.pt`, a state dict of torchao's int8 tensors": "quantised_tensors_is_written_out",
    "other pickles, under any ending: refused": "pickles_are_refused",
    "`.onnx`, free and fixed batch sizes": "free_and_fixed_batch_sizes",
    "`.onnx` with its weights beside it": "with_its_weights_beside_it",
    "`.onnx`, cut short: refused": "test_onnx.*truncated",
}
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
}
ACCELERATED = {
    "fused attention, float16 and bfloat16": "test_gpu.*flash_attention",
    "cuDNN RNN": "test_gpu.*cudnn_rnn",
    "float16 with `GradScaler`, compiled or not": "test_gpu.*grad_scaler",
    "a benchmark: marked, attacked and read there": "test_gpu.*benchmark_is_made_there",
}


def run(group: str) -> None:
    """Run the group's tests, and keep each one's outcome and what it recorded."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        paths = [(HERE.parent / "tests" / name) for name in FILES[group]]
        files = [str(path.with_name(f"test_{path.name}.py")) for path in paths]
        command = [sys.executable, "-m", "pytest", "-q", "-m", "not slow", "-p", "no:xdist"]
        command += ["-o", "junit_family=xunit1", f"--junitxml={report}", *files]
        subprocess.run(command, cwd=HERE.parent, check=False)
        cases = ET.parse(report).getroot().iter("testcase")
        tests = {f"{c.get('classname', '').rpartition('.')[2]}::{c.get('name')}": _told(c) for c in cases}
    versions = {name: version(name) for name in LIBRARIES[group]}
    versions |= {"gradmark": __version__, "python": platform.python_version()}
    if torch.cuda.is_available():
        versions["accelerator"] = torch.cuda.get_device_name()
    RESULTS.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"versions": versions, "tests": tests}, indent=1, sort_keys=True)
    (RESULTS / f"{group}.json").write_text(text + "\n")


def _told(case: ET.Element) -> dict[str, Any]:
    found: dict[str, Any] = {"outcome": "passed"}
    for outcome in ("failure", "error", "skipped"):
        if (node := case.find(outcome)) is not None:
            found = {"outcome": outcome, "reason": node.get("message", "").split("\n")[0][:200]}
    kept = {p.get("name", ""): _bare(p.get("value", "")) for p in case.iter("property")}
    return found | ({"recorded": kept} if kept else {})


def _bare(text: str) -> str:
    """Without padding."""
    return re.sub(r"x{9,}", "...", text)


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
    says = next((r["recorded"]["refusal"] for r in rows if "refusal" in r.get("recorded", {})), "")
    return f"passes ({len(rows)} test{'s' if len(rows) > 1 else ''}){': ' if says else ''}{_quoted(says)}"


def _quoted(text: str) -> str:
    """What gradmark says, in a cell of a table."""
    return f"“{text.replace('|', '/')}”" if text else ""


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
            says = refused[0].get("recorded", {}).get("refusal")
            lines.append(f"| {name} | | | {f'refuses: {says}' if says else cell(refused)} |")
        elif same and "recorded" in same[0]:
            a, b = (float(same[0]["recorded"][n]) for n in ("gradients", "weights"))
            lines.append(f"| {name} | {a:.0e} | {b:.0e} | {cell([*own.values()])} |")
        else:
            lines.append(f"| {name} | | | {cell([*own.values()])} |")
    return [*lines, ""]


def listed(title: str, about: str, rows: dict[str, str], tests: dict[str, Any]) -> list[str]:
    lines = [f"### {title}", "", about, "", "| set-up | outcome |", "|---|---|"]
    return [*lines, *(f"| {name} | {cell(matching(tests, p))} |" for name, p in rows.items()), ""]


SIDES = {
    "default": "default",
    "shared": "`penalty(model, batch, scores)`",
    "placed": "`ease=True`, placed",
    "placed, shared": "both, placed",
}


def overhead() -> list[str]:
    """The cost of the penalty, from ``overhead.py`` and ``cheap.py``."""
    rows = [json.loads(p.read_text()) for p in sorted((HERE / "results" / "overhead").glob("*.json"))]
    lines = [
        "### Cost of a training step with the default scheme",
        "",
        "Over a step without it, interleaved in one run; `overhead.py` says how it is measured. The aim is 1.10 in time and 1.15",
        "in memory. The default is 32 carriers on every 4th step, cut in proportion for batches of 8, to 2. Each cell: `every=4`, `every=16`.",
        "`scores` are those of the task's own forward pass, which spare one. `ease=True` leaves out parts that are placed: its columns are the",
        "cost once the filter and the triggers are, while the wrong classes still are pushed.",
        "",
        "| network | weights, millions | batch | " + " | ".join(SIDES.values()) + " |",
        "|---|---|---|" + "---|" * len(SIDES),
    ]
    for r in rows:
        if r["time"]:
            times = [r["time"].get(s) for s in SIDES]
            cells = ["" if t is None else f"{t['ratio']:.2f}, {t['ratio_every_16']:.2f}" for t in times]
            lines.append(
                f"| {r['network']} | {r['weights'] / 1e6:.1f} | {r['batch']} | {' | '.join(cells)} |"
            )
    lines += [
        "",
        "Peak memory over that of a plain step, whatever `every` is. `lean=True`, with `penalty` called before the task's forward pass, lets the",
        "graph of one part of the mark go before the next is built, and all of them before the task's; it holds up to two gradients more. The",
        "transformers have 16 tokens, or 128 where it says so: the fewer, the more of the memory are weights.",
        "",
        "| network | plain step, MB | default | lean |",
        "|---|---|---|---|",
    ]
    for r in rows:
        memory = r["memory"]
        cells = [f"{memory[s]['ratio']:.2f}" for s in ("default", "lean")]
        lines.append(f"| {r['network']} | {memory['plain'] / 1e6:.0f} | {' | '.join(cells)} |")
    told = [
        f"The first call's preflight peaks at {r['memory']['lean with preflight']['ratio']:.2f} times a plain step's memory on "
        f"{r['network']}: it copies the weights in float64."
        for r in rows
        if "lean with preflight" in r["memory"]
    ]
    return [*lines, "", *told, "", *evidence()]


def evidence() -> list[str]:
    rows = [json.loads(p.read_text()) for p in sorted((HERE / "results" / "cheap").glob("*.json"))]
    settings: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for r in rows:
        key = (r["steps"], r["carriers"], r["every"], r["ease"], r["scores"])
        settings.setdefault(key, []).append(r)
    lines = [
        "What a cheaper penalty leaves of the evidence, digits (`cheap.py`): log10 p of each seed.",
        "",
        "| steps | carriers, every | added to a step's 64 inputs | accuracy given up, points | white-box | black-box |",
        "|---|---|---|---|---|---|",
    ]
    for (steps, carriers, every, ease, scores), of in sorted(
        settings.items(), key=lambda kv: (kv[0][0], -kv[1][0]["rows"])
    ):
        cost = [100 * (r["accuracy_control"] - r["accuracy_marked"]) for r in of]
        told = [", ".join(f"{r[a]['log10_p']:.0f}" for r in of) for a in ("white", "black")]
        given = ", ".join(f"{c:.2f}" for c in cost)
        name = f"{carriers}, {every}{', scores' if scores else ''}{', ease' if ease else ''}"
        lines.append(f"| {steps} | {name} | {of[0]['rows']:.1f} | {given} | {told[0]} | {told[1]} |")
    return [*lines, ""] if rows else []


def section(name: str, lines: list[str]) -> None:
    """Put ``lines`` between ``<!-- NAME -->`` and ``<!-- /NAME -->`` of the page, which must have both."""
    text = PAGE.read_text()
    start, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    head, _, rest = text.partition(start)
    _, found, tail = rest.partition(end)
    assert found, f"no {start} ... {end} in {PAGE}"
    PAGE.write_text(f"{head}{start}\n" + "\n".join(lines).strip() + f"\n{end}{tail}")


def endpoints(told: dict[str, Any]) -> list[str]:
    """What the suspect's side was shown to do."""
    tests = told["tests"]
    return [
        "## Endpoints and files",
        "",
        f"Tested with {_versions(told)}. Servers are real ones on loopback: FastAPI under uvicorn, a network run by onnxruntime",
        "behind it. Where something is refused, the outcome is followed by what gradmark says.",
        "",
        *listed("What is spoken", "`docs/endpoints.md` has the options.", SPOKEN, tests),
        *listed("What is kept to", "Whatever the endpoint speaks.", KEPT, tests),
        *listed("Files", "Nothing is unpickled without `weights_only=True`.", OPENED, tests),
        *few(),
    ]


def few() -> list[str]:
    from queries import APIS, GRADSIGNS, rows, shown

    found = [r for r in rows() if (r["task"], r["suspect"]) == ("cifar10", "marked")]
    lines = [
        "### Few queries",
        "",
        "Queries until e >= 1e9 on the marked CIFAR-10 ResNet-20 (`queries.py`), 8-bit inputs, with all parts of the mark and with",
        f"gradients and wrong classes alone. The aim is 300; GradSigns takes {GRADSIGNS:,}. `benchmarks/QUERIES.md` has more.",
        "",
        "| what the API tells | all parts | without triggers |",
        "|---|---|---|",
    ]
    for api in APIS:
        cells = [
            shown([r for r in found if (r["api"], r["parts"]) == (api, p)])
            for p in ("all", "without triggers")
        ]
        lines.append(f"| {api} | {' | '.join(cells)} |")
    return [*lines, ""]


def _versions(told: dict[str, Any]) -> str:
    return ", ".join(f"{name} {v}" for name, v in told["versions"].items() if name != "gradmark")


def trainers(told: dict[str, Any]) -> list[str]:
    """What the training side was shown to do, and its cost."""
    tests = told["tests"]
    return [
        "## Training loops",
        "",
        f"Tested with {_versions(told)}, on a CPU. Made by `python benchmarks/compatibility.py` from the tests' own records.",
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
        *listed("Precision, memory, compilation", "On a CPU.", PRECISIONS, tests),
        *accelerated(),
        *overhead(),
    ]


def accelerated() -> list[str]:
    """What only an accelerator shows, with its name and versions: it isn't the machine of the other rows."""
    told = json.loads((RESULTS / "accelerator.json").read_text())
    said = ", ".join(
        f"{name} {value}" for name, value in sorted(told["versions"].items()) if name != "accelerator"
    )
    head = f"{told['versions']['accelerator']}, {said}. {told.get('note', '')}".strip()
    return listed("On an accelerator", head, ACCELERATED, told["tests"])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", nargs="*", choices=list(FILES), default=[])
    groups = parser.parse_args().run
    if "accelerator" in groups and not torch.cuda.is_available():
        parser.error("there is no accelerator here, and what one showed would be lost")
    for group in groups:
        run(group)
    for group, lines in (("trainers", trainers), ("endpoints", endpoints)):
        section(group, lines(json.loads((RESULTS / f"{group}.json").read_text())))


if __name__ == "__main__":
    main()
