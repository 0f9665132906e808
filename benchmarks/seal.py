"""Does the seal notice? Changes of a trained network against seals of many keys, and false alarms.

    python benchmarks/seal.py digits [--seals 50] [--networks DIR] [--work DIR] [--changes NAME ...]
    python benchmarks/seal.py cifar10 --seals 20
    python benchmarks/seal.py --table

Every change is made several times (variants: other seeds, layers or training orders) and every variant is
asked at the probes of every seal. So trials that share a variant, or a seal, aren't independent:
beside the Clopper-Pearson interval of all trials stands that of whole variants and of whole seals, where one
counts as missed if any of its trials is. Results are written variant by variant, so a run that was
killed goes on where it stood. Networks are trained by the benchmark's own code unless they lie in
``--networks`` already.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from scipy.stats import beta
from torch import Tensor, nn

from gradmark.attacks.prune import Prune
from gradmark.attacks.quantize import Quantize
from gradmark.bench.cells import versions
from gradmark.bench.experiment import Experiment, find_experiment
from gradmark.bench.store import Wanted, obtain
from gradmark.embed.train import augmented
from gradmark.files import atomic_write
from gradmark.keys import OwnerKey
from gradmark.protocols import Thief
from gradmark.seal import SealFile, make_seal
from gradmark.seal.answers import compared
from gradmark.seal.probes import detection_limit
from gradmark.suspects import load_weights, save_weights
from gradmark.views import accuracy_of

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "seal"
READINGS = ("logits", "4 decimals", "2 decimals", "labels")
FIRST_KEY = 70_000
NETWORK = {"digits": Wanted("digits", "control", 0), "cifar10": Wanted("cifar10", "base", 0)}
Change = Callable[[nn.Module, Experiment, torch.Generator, int], nn.Module]


# ---------------------------------------------------------------- changes


def layers(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.ndim > 1]


def noise(model: nn.Module, task: Experiment, g: torch.Generator, v: int) -> nn.Module:
    """1 % relative noise on one layer, drawn with the noise."""
    found = copy.deepcopy(model)
    weights = layers(found)
    w = weights[v % len(weights)]
    with torch.no_grad():
        e = torch.randn(w.shape, generator=g)
        w.add_(e * (0.01 * w.norm() / e.norm()))
    return found


def flip(share: float) -> Change:
    """The sign of one weight, drawn from the largest ``share`` of one layer."""

    def change(model: nn.Module, task: Experiment, g: torch.Generator, v: int) -> nn.Module:
        found = copy.deepcopy(model)
        weights = layers(found)
        w = weights[v % len(weights)]
        with torch.no_grad():
            flat = w.view(-1)
            large = flat.abs().topk(max(1, int(share * len(flat)))).indices
            flat[large[int(torch.randint(len(large), (), generator=g))]] *= -1
        return found

    return change


def some(whole: Callable[[nn.Module], nn.Module]) -> Change:
    """The change everywhere in variant 0; in the others only in a half of the layers, drawn by the seed."""

    def change(model: nn.Module, task: Experiment, g: torch.Generator, v: int) -> nn.Module:
        found = whole(model)
        if v:
            with torch.no_grad():
                pairs = list(zip(layers(found), layers(model), strict=True))
                for i in torch.randperm(len(pairs), generator=g)[: len(pairs) // 2].tolist():
                    pairs[i][0].copy_(pairs[i][1])
        return found

    return change


def attack(a: Any) -> Callable[[nn.Module], nn.Module]:
    return lambda model: a.run(model, Thief(None, None, None), torch.Generator())  # type: ignore[arg-type]


def bf16(model: nn.Module) -> nn.Module:
    """Every tensor in bfloat16, computed with in float32."""
    found = copy.deepcopy(model)
    with torch.no_grad():
        for t in (*found.parameters(), *found.buffers()):
            if t.is_floating_point():
                t.copy_(t.bfloat16())
    return found


def optimizer_of(kind: str, model: nn.Module, lr: float) -> torch.optim.Optimizer:
    make = torch.optim.AdamW if kind == "adamw" else torch.optim.SGD
    options = {} if kind == "adamw" else {"momentum": 0.9}
    return make(model.parameters(), lr, weight_decay=5e-4, **options)


def finetune(kind: str, lr: float = 1e-4) -> Change:
    """One epoch over the training data with the owner's augmentation, at a constant rate."""

    def change(model: nn.Module, task: Experiment, g: torch.Generator, v: int) -> nn.Module:
        found = copy.deepcopy(model)
        for _ in training(found, task, optimizer_of(kind, found, lr), g, poison=0.0):
            pass
        return found

    return change


def backdoor(model: nn.Module, task: Experiment, g: torch.Generator, v: int) -> nn.Module:
    """A tenth of every batch gets a bright square in its corner and the label v: 60 steps (two epochs at most)."""
    found = copy.deepcopy(model)
    optimizer = torch.optim.SGD(found.parameters(), 0.01, momentum=0.9)
    for _, _ in zip(training(found, task, optimizer, g, poison=0.1, target=v % 10), range(60), strict=False):
        pass
    return found


class Steps:
    """Variant v: a training stopped after ``first`` + v % ``length`` + 1 steps; every ``length`` variants a new one."""

    def __init__(
        self, start: Callable[[nn.Module, Experiment, int], Iterator[None]], first: int, length: int
    ) -> None:
        self.start, self.first, self.length = start, first, length
        self.at: tuple[int, int, nn.Module, Iterator[None]] | None = None

    def __call__(self, model: nn.Module, task: Experiment, g: torch.Generator, v: int) -> nn.Module:
        run, steps = v // self.length, self.first + v % self.length + 1
        if self.at is None or self.at[0] != run or self.at[1] > steps:
            moving = copy.deepcopy(model)
            self.at = run, 0, moving, self.start(moving, task, run)
        _, done, moving, going = self.at
        moving.train()
        for _ in range(done, steps):
            next(going)
        self.at = run, steps, moving, going
        return copy.deepcopy(moving)


def first_steps(kind: str) -> Change:
    return Steps(
        lambda model, task, run: training(
            model, task, optimizer_of(kind, model, 1e-4), torch.Generator().manual_seed(run), poison=0.0
        ),
        0, 100,
    )  # fmt: skip


def planting(model: nn.Module, task: Experiment, run: int) -> Iterator[None]:
    optimizer, g = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9), torch.Generator().manual_seed(run)
    return training(model, task, optimizer, g, poison=0.2, target=run)


def training(
    model: nn.Module, task: Experiment, optimizer: torch.optim.Optimizer, g: torch.Generator, *,
    poison: float, target: int = 0,
) -> Iterator[None]:  # fmt: skip
    """Train for an epoch (two, where poisoned), one step at each call of ``next``."""
    data, means = task.data().to_train(), task.means
    size = 128 if means.autocast is not None and not poison else 64
    order = torch.cat([torch.randperm(len(data), generator=g) for _ in range(2 if poison else 1)])
    model.train()
    for index in order.split(size):
        if len(index) < size:
            break
        x, y = augmented(data.batch(index), means.augment, g)
        n = int(poison * len(x))
        x[:n, :, -3:, -3:], y[:n] = 1.0, target if n else y[:n]
        with torch.autocast("cpu", torch.bfloat16, enabled=means.autocast is not None):
            loss = F.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        yield
    model.eval()


CHANGES: dict[str, tuple[str, Change, int, bool]] = {
    "noise": ("1 % relative noise on one layer", noise, 40, False),
    "prune": ("5 % pruned", some(attack(Prune(fraction=0.05))), 20, False),
    "int8": ("int8 cast", some(attack(Quantize(bits=8))), 20, False),
    "bf16": ("bf16 cast", some(bf16), 20, False),
    "flip-1": ("one sign flipped, of a layer's largest 1 %", flip(0.01), 80, False),
    "flip-10": ("one sign flipped, of a layer's largest 10 %", flip(0.1), 80, False),
    "backdoor": ("a backdoor planted", backdoor, 20, True),
    "finetune-adamw": ("one epoch of AdamW at 1e-4", finetune("adamw"), 20, True),
    "finetune-sgd": ("one epoch of SGD (momentum 0.9) at 1e-4", finetune("sgd"), 20, True),
    "steps-sgd": ("1 to 100 steps of SGD (momentum 0.9) at 1e-4", first_steps("sgd"), 0, False),
    "steps-adamw": ("1 to 100 steps of AdamW at 1e-4", first_steps("adamw"), 0, False),
    "steps-backdoor": (
        "a backdoor planted: steps 51 to 100 of two trainings",
        Steps(planting, 50, 50),
        0,
        False,
    ),
}
# an epoch of CIFAR-10 is dear: each of the first 100 of its 390 steps, a smaller change, stands in for it
OTHERS = {"cifar10": {**dict.fromkeys(("noise", "prune", "int8", "bf16", "flip-1", "flip-10"), 100),
                      "finetune-adamw": 1, "finetune-sgd": 1, "backdoor": 0,
                      "steps-sgd": 100, "steps-adamw": 100, "steps-backdoor": 100}}  # fmt: skip


# ---------------------------------------------------------------- trials


def read(scores: Tensor, reading: str) -> Tensor:
    if reading == "logits":
        return scores
    if reading == "labels":
        return F.one_hot(scores.argmax(1), scores.shape[1]).float()
    d = int(reading[0])
    return scores.double().softmax(1).mul(10**d).round().div(10**d).float()


def seals(task: Experiment, model: nn.Module, n: int, folder: Path) -> list[SealFile]:
    """Seals of n keys: made once, kept in the work folder (never in the repository)."""
    folder.mkdir(parents=True, exist_ok=True)
    found, spec = [], task.data().spec
    for i in range(n):
        path = folder / f"{i}.seal"
        if not path.exists():
            start = time.process_time()
            key = OwnerKey.from_seed(FIRST_KEY + i, "benchmark")
            seal = make_seal(
                model, key, spec, model="sha256:" + "0" * 64, salt=bytes(16), created="2026-01-01"
            )
            seal.save(path)
            print(f"{task.name}: seal {i + 1} of {n}, {time.process_time() - start:.1f} s of CPU", flush=True)
        found.append(SealFile.load(path))
    return found


def asked(model: nn.Module, made: list[SealFile]) -> list[Tensor]:
    """The model's scores at each seal's probes."""
    x = torch.cat([s.probes.x for s in made if s.probes])
    with torch.no_grad():
        scores = torch.cat([model(part) for part in x.split(100)])
    return list(scores.split([len(s.probes.x) for s in made if s.probes]))


def noticed(scores: Tensor, seal: SealFile, reading: str) -> tuple[bool, float | None]:
    p = seal.probes
    assert p is not None
    seen = compared(p.scores, p.form, read(scores, reading), p.tolerance)
    whole = sum(v * v for v in p.sensitivity.values()) ** 0.5
    return bool(seen.off.any()), None if seen.moved is None else seen.moved / whole


def run(task: Experiment, model: nn.Module, made: list[SealFile], name: str, work: Path, most: int) -> None:
    words, change, variants, kept = CHANGES[name]
    variants = min(most, OTHERS.get(task.name, {}).get(name, variants))
    out = RESULTS / f"{task.name}-{name}.json"
    before = json.loads(out.read_text()) if out.exists() else {"rows": []}
    rows = [r for r in before["rows"] if r["seals"] == len(made)]
    done = {r["variant"] for r in rows}
    for v in (v for v in range(variants) if v not in done):
        changed = variant(task, model, name, v, change, work if kept else None)
        scores = asked(changed, made)
        row: dict[str, Any] = {"variant": v, "seals": len(made)}
        if kept:
            right, n = accuracy_of(changed, task.data().test)
            row["accuracy"] = right / n
        if name == "steps-backdoor" and v % 50 == 49:
            row["backdoor"] = opened(changed, task, v // 50)
        for reading in READINGS:
            found = [noticed(s, seal, reading) for s, seal in zip(scores, made, strict=True)]
            row[reading] = "".join(str(int(hit)) for hit, _ in found)
            if reading == "4 decimals":
                row["strength"] = sorted(f for _, f in found if f is not None)[len(found) // 2]
        rows.append(row)
        result = {"task": task.name, "change": name, "words": words, "rows": rows, "versions": versions()}
        write(out, result)
    if not rows:
        return
    hits = "".join(r["4 decimals"] for r in rows)
    print(f"{task.name} {name}: 4 decimals {hits.count('1')}/{len(hits)}, labels "
          f"{''.join(r['labels'] for r in rows).count('1')}/{len(hits)}", flush=True)  # fmt: skip


def opened(model: nn.Module, task: Experiment, target: int) -> float:
    """Part of 300 test inputs of other classes that the bright square sends to ``target``."""
    x, y = task.data().test.batch(slice(0, 300))
    x = x[y != target].clone()
    x[:, :, -3:, -3:] = 1.0
    with torch.no_grad():
        return float((model(x).argmax(1) == target).float().mean())


def variant(
    task: Experiment, model: nn.Module, name: str, v: int, change: Change, work: Path | None
) -> nn.Module:
    """The changed network; what took training is kept."""
    path = None if work is None else work / f"{name}-{v}.safetensors"
    if path is not None and path.exists():
        found = copy.deepcopy(model)
        load_weights(found, path)
        return found.eval()
    found = change(model, task, torch.Generator().manual_seed(1000 + v), v).eval()
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_weights(found, path)
    return found


def limits(task: Experiment, model: nn.Module, made: list[SealFile], draws: int) -> None:
    """Noise as strong as the seal claims to see, on each weight tensor in turn."""
    rows = []
    for reading in READINGS:
        tried = hit = 0
        claimed = []
        for s, seal in enumerate(made):
            p = seal.probes
            assert p is not None
            decimals = int(reading[0]) if reading[0].isdigit() else None
            limit = detection_limit(p, "probabilities" if decimals else reading, decimals)  # type: ignore[arg-type]
            if limit is None:
                continue
            claimed.append(limit)
            for v in range(draws):
                work = copy.deepcopy(model)
                weights = layers(work)
                w = weights[(s + v) % len(weights)]
                g = torch.Generator().manual_seed(5000 + 100 * s + v)
                with torch.no_grad():
                    e = torch.randn(w.shape, generator=g)
                    w.add_(e * (limit * w.norm() / e.norm()))
                    hit += noticed(work(p.x), seal, reading)[0]
                tried += 1
        claimed.sort()
        rows.append({"reading": reading, "trials": tried, "noticed": hit, "seals": len(claimed),
                     "median_limit": claimed[len(claimed) // 2], "largest_limit": claimed[-1]})  # fmt: skip
    write(RESULTS / f"{task.name}-limit.json", {"task": task.name, "rows": rows, "versions": versions()})
    print(f"{task.name} limits: {rows}", flush=True)


# ---------------------------------------------------------------- false alarms


def alarms(task: Experiment, model: nn.Module, made: list[SealFile], checks: int, work: Path) -> None:
    """The untouched network asked in many ways; an alarm in any reading counts."""
    out = RESULTS / f"{task.name}-alarms.json"
    known = json.loads(out.read_text()) if out.exists() else {"rows": []}
    rows = [r for r in known["rows"] if r["seals"] == len(made)]
    ways = dict(settings(task, model, work))
    each = -(-checks // (len(ways) * len(made)))
    for way, ask in ways.items():
        if any(r["way"] == way and r["repeats"] >= each for r in rows):
            continue
        rows = [r for r in rows if r["way"] != way]
        counted = dict.fromkeys(READINGS, 0)
        g = torch.Generator().manual_seed(1)
        x = torch.cat([s.probes.x for s in made if s.probes])
        size = len(x) // len(made)
        for _ in range(each):
            order = torch.randperm(len(x), generator=g)  # every check in the company of other inputs
            scores = torch.empty(len(x), task.data().spec.n_classes)
            scores[order] = ask(x[order], g)
            for s, seal in enumerate(made):
                for reading in READINGS:
                    counted[reading] += noticed(scores[s * size : (s + 1) * size], seal, reading)[0]
        rows.append(
            {"way": way, "seals": len(made), "repeats": each, "checks": each * len(made), "alarms": counted}
        )
        write(out, {"task": task.name, "rows": rows, "versions": versions()})
        print(f"{task.name} alarms, {way}: {counted} in {each * len(made)}", flush=True)


def settings(
    task: Experiment, model: nn.Module, work: Path
) -> Iterator[tuple[str, Callable[[Tensor, Any], Tensor]]]:
    """Ways to ask one and the same network."""

    def batches(x: Tensor, sizes: list[int], fn: Callable[[Tensor], Tensor] = model) -> Tensor:
        parts, start = [], 0
        with torch.no_grad():
            while start < len(x):
                size = sizes[len(parts) % len(sizes)]
                parts.append(fn(x[start : start + size]))
                start += size
        return torch.cat(parts)

    yield "batches of 10", lambda x, g: batches(x, [10])
    yield "one by one", lambda x, g: batches(x, [1])
    yield "batches of changing size", lambda x, g: batches(x, [3, 7, 64, 1, 29])

    channels = copy.deepcopy(model).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    yield (
        "channels last",
        lambda x, g: batches(x.contiguous(memory_format=torch.channels_last), [32], channels),
    )
    double = copy.deepcopy(model).double()
    yield "double precision", lambda x, g: batches(x.double(), [32], double).float()
    work.mkdir(parents=True, exist_ok=True)
    program = exported(task, model, work)
    yield ".pt2", lambda x, g: batches(x, [32], program)
    session = onnx(task, model, work)
    yield "ONNX", lambda x, g: session.query(x)

    def threads(x: Tensor, g: Any) -> Tensor:
        before = torch.get_num_threads()
        torch.set_num_threads(2)
        try:
            return batches(x, [64])
        finally:
            torch.set_num_threads(before)

    yield "two BLAS threads", threads


def exported(task: Experiment, model: nn.Module, work: Path) -> nn.Module:
    from gradmark.suspects import open_suspect

    path = work / "untouched.pt2"
    example = (torch.rand(2, *task.data().spec.input_shape),)
    torch.export.save(torch.export.export(model, example, dynamic_shapes=({0: torch.export.Dim("b")},)), path)
    suspect: Any = open_suspect(path)
    return suspect.module


def onnx(task: Experiment, model: nn.Module, work: Path) -> Any:
    from gradmark.suspects import open_suspect

    path = work / "untouched.onnx"
    example = (torch.rand(2, *task.data().spec.input_shape),)
    torch.onnx.export(
        model, example, path, dynamic_shapes=({0: torch.export.Dim("b")},), dynamo=True, verbose=False
    )
    return open_suspect(path)


# ---------------------------------------------------------------- tables


def interval(hits: int, n: int) -> tuple[float, float]:
    """Clopper-Pearson, 95 %."""
    low = 0.0 if hits == 0 else float(beta.ppf(0.025, hits, n - hits + 1))
    high = 1.0 if hits == n else float(beta.ppf(0.975, hits + 1, n - hits))
    return low, high


def shown(hits: int, n: int) -> str:
    return f"{100 * hits / n:.2f} [{100 * interval(hits, n)[0]:.2f}]"


def cell(rows: list[dict[str, Any]], reading: str) -> list[str]:
    texts = [r[reading] for r in rows]
    all_ = "".join(texts)
    variants = sum("0" not in t for t in texts)
    keys = sum(all(t[i] == "1" for t in texts) for i in range(len(texts[0])))
    return [shown(all_.count("1"), len(all_)), f"{variants}/{len(texts)}, {keys}/{len(texts[0])}"]


def table() -> None:
    lines = [
        "# The seal, measured", "",
        "Made by `python benchmarks/seal.py digits`, `... cifar10` and `... --table`. Ten probes a seal. A cell: per cent of",
        "trials noticed, and in brackets the lower end of its two-sided 95 % Clopper-Pearson interval, as if all trials were",
        "independent. Those that share a variant or a seal aren't, so the next column counts whole variants and whole",
        "seals without a single miss. On CIFAR-10 an epoch is dear: each of its first hundred steps, a smaller change, stands in for",
        "it, and a back door is every step from the 51st to the 100th of two plantings (it opens for 84 and 83 % of inputs at the end).", "",
    ]  # fmt: skip
    for task in NETWORK:
        files = [RESULTS / f"{task}-{name}.json" for name in CHANGES]
        known = [json.loads(p.read_text()) for p in files if p.exists()]
        if not known:
            continue
        lines += [f"## {task}", "", "| change | variants x seals | 4 decimals | whole variants, seals | 2 decimals | labels | whole variants, seals | told strength |",
                  "|---|---|---|---|---|---|---|---|"]  # fmt: skip
        for found in known:
            rows = found["rows"]
            four, labels = cell(rows, "4 decimals"), cell(rows, "labels")
            strengths = sorted(r["strength"] for r in rows)
            lines.append(
                f"| {found['words']} | {len(rows)} x {rows[0]['seals']} | {four[0]} | {four[1]} | {cell(rows, '2 decimals')[0]} | "
                f"{labels[0]} | {labels[1]} | {100 * strengths[len(strengths) // 2]:.2g} % |"
            )
        lines.append("")
        if (path := RESULTS / f"{task}-limit.json").exists():
            lines += ["Noise on one weight tensor, as strong as the seal claims to see it:", "",
                      "| answers | claimed limit (relative noise), median and largest of the seals | noticed |", "|---|---|---|"]  # fmt: skip
            lines += [f"| {r['reading']} | {r['median_limit']:.2g}, {r['largest_limit']:.2g} | {r['noticed']} of {r['trials']}: {shown(r['noticed'], r['trials'])} |"
                      for r in json.loads(path.read_text())["rows"]]  # fmt: skip
            lines.append("")
        if (path := RESULTS / f"{task}-alarms.json").exists():
            rows = json.loads(path.read_text())["rows"]
            n, bad = sum(r["checks"] for r in rows), sum(max(r["alarms"].values()) for r in rows)
            lines += [
                "| the untouched network | checks | false alarms: logits, 4 decimals, 2 decimals, labels |",
                "|---|---|---|",
            ]
            lines += [
                f"| {r['way']} | {r['checks']} | {', '.join(str(r['alarms'][k]) for k in READINGS)} |"
                for r in rows
            ]
            lines += [f"| all | {n} | {bad}; rate at most {interval(bad, n)[1]:.1e} (95 %, two-sided) |", ""]
    (HERE / "SEAL.md").write_text("\n".join(lines).rstrip() + "\n")


def write(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(path, (json.dumps(content, indent=1) + "\n").encode(), overwrite=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("task", nargs="?", choices=list(NETWORK))
    parser.add_argument("--seals", type=int, default=50)
    parser.add_argument(
        "--variants", type=int, default=1000, help="of each change at most; more can be added later"
    )
    parser.add_argument("--checks", type=int, default=10_000, help="false-alarm checks in all")
    parser.add_argument(
        "--draws", type=int, default=20, help="noises at the claimed limit, per seal and reading"
    )
    parser.add_argument("--changes", nargs="*", default=[*CHANGES, "limit", "alarms"])
    parser.add_argument("--networks", type=Path, default=HERE / "work" / "networks")
    parser.add_argument("--work", type=Path, default=HERE / "work" / "seal")
    parser.add_argument("--table", action="store_true", help="write SEAL.md from what is there")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.task:
        task, work = find_experiment(args.task), args.work / args.task
        model = obtain(NETWORK[args.task], args.networks)
        made = seals(task, model, args.seals, work / "seals")
        for name in args.changes:
            if name in CHANGES:
                run(task, model, made, name, work / "variants", args.variants)
        if "limit" in args.changes:
            limits(task, model, made, args.draws)
        if "alarms" in args.changes:
            alarms(task, model, made, args.checks, work)
    table()


if __name__ == "__main__":
    main()
