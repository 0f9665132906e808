"""``gradmark demo``: sign a small network, attack it, and judge it and some innocents, all in one go."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from gradmark import catalog
from gradmark.bench.networks import DigitsNet
from gradmark.codec import MarkFile, atomic_write
from gradmark.commands.progress import Bar
from gradmark.commands.summary import WORDS
from gradmark.commands.verify import need_for_reports
from gradmark.data import Data, load_data
from gradmark.demo.report import Case, demo_report
from gradmark.embed import Marker, Recipe, accuracy_of, train
from gradmark.endpoint import serve
from gradmark.ensemble import Ensemble
from gradmark.errors import OutputPathError
from gradmark.keys import OwnerKey
from gradmark.protocols import Access, BlackBox, Scheme, Thief
from gradmark.report import write_report
from gradmark.schemes.class_contrast import ClassContrast
from gradmark.schemes.filter_gradient import FilterGradient
from gradmark.schemes.trigger import Trigger
from gradmark.suspects import HttpSuspect, ModuleSuspect
from gradmark.verify import DEFAULT_ALPHA, verify

SCHEME = Ensemble((FilterGradient(bits=128, kernel_size=5, step=0.1), ClassContrast(), Trigger()))
MARKER: dict[str, Any] = {"budget": 0.5, "carriers": 64, "every": 1}
RECIPE = Recipe(epochs=25)
SMOOTHING = 0.1  # of the marked network's labels
CARRIERS = 200
QUERIES = 2000
TUNING_EPOCHS = 5
THIEFS_RATE = 0.01  # by plain SGD with momentum
OWNER = "gradmark demo"
ATTACKS: tuple[tuple[str, str, dict[str, Any]], ...] = (
    (f"fine-tuned {TUNING_EPOCHS} epochs", "finetune", {"epochs": TUNING_EPOCHS}),
    ("30% pruned", "prune", {"fraction": 0.3}),
    ("50% pruned", "prune", {"fraction": 0.5}),
    ("70% pruned", "prune", {"fraction": 0.7}),
    ("weights in 8 bits", "quantize", {"bits": 8}),
    ("weights in 4 bits", "quantize", {"bits": 4}),
)


@dataclass(frozen=True)
class DemoResult:
    """Every case that was judged, and where the report is."""

    cases: tuple[Case, ...]
    accuracy: dict[str, float]
    report: str
    seconds: float

    @property
    def as_expected(self) -> bool:
        """The owner is recognised both ways, and no innocent is accused."""
        return all((c.verdict.outcome == "owned") is not c.innocent for c in self.cases if not c.attack)

    def to_json(self) -> dict[str, Any]:
        verdicts = [
            {
                "name": c.name,
                "innocent": c.innocent,
                "attack": c.attack or None,
                "accuracy": c.accuracy,
                **c.verdict.to_json(),
            }
            for c in self.cases
        ]
        return {
            "verdicts": verdicts,
            "accuracy": self.accuracy,
            "report": self.report,
            "seconds": self.seconds,
        }

    def shown(self) -> list[Table | str]:
        """What a terminal shows."""
        table = Table("Case", "innocent", "accuracy", "match", "log10 p", "outcome")
        for c in self.cases:
            v = c.verdict
            cells = (
                f"{100 * c.accuracy:.1f}%",
                f"{v.n_match}/{v.n_bits - v.ties}",
                f"{v.log10_p:.1f}",
                WORDS[v.outcome],
            )
            table.add_row(c.name, "yes" if c.innocent else "no", *cells)
        end = "All as it should be." if self.as_expected else "NOT as it should be: see the table."
        return [table, f"{end} Took {self.seconds:.0f} s. Report: {self.report}"]


@dataclass(frozen=True)
class _Bench:
    """What every case of the demo shares."""

    data: Data
    key: OwnerKey
    mark: MarkFile
    control: nn.Module

    @property
    def scheme(self) -> Scheme:
        return catalog.scheme(self.mark.scheme, self.mark.scheme_parameters)

    def case(
        self, name: str, model: nn.Module, *, innocent: bool, access: Access = "white", attack: str = "",
        strength: float | None = None, suspect: BlackBox | None = None,
    ) -> Case:  # fmt: skip
        right, n = accuracy_of(model, self.data.test)
        suspect = suspect or ModuleSuspect(model, name=name)
        verdict = verify(
            self.mark,
            self.key,
            suspect,
            self.data.test.all(),
            access=access,
            alpha=DEFAULT_ALPHA,
            queries=QUERIES,
        )
        return Case(name, innocent, right / n, verdict, attack, strength)


def run_demo(out: Path, seed: int, console: Console) -> DemoResult:
    """Train, judge, attack, judge again; writes ``out``/report.html and demo.json.

    On one thread: networks this small gain nothing from more, and lose much where the cores are busy.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return _run(out, seed, console)
    finally:
        torch.set_num_threads(threads)


def _run(out: Path, seed: int, console: Console) -> DemoResult:
    start = time.perf_counter()
    need_for_reports()
    _prepare(out)
    data = load_data("digits")
    with Bar(console) as bar:
        control, control_history = _trained(data, seed, None, "control", bar)
        bench = _bench(data, OwnerKey.from_seed(seed, OWNER), control)
        marker = Marker(bench.scheme, bench.key, data.spec, seed=seed, **MARKER)
        marked, history = _trained(data, seed, marker, "marked", bar)
        other, _ = _trained(data, seed + 1, None, "other", bar)
        cases = [*_owner(bench, marked), *_innocents(bench, seed, marked, control, other)]
        cases += _attacked(bench, marked, seed, bar)
    accuracy = {
        "marked": cases[0].accuracy,
        "control": next(c.accuracy for c in cases if c.name.startswith("control")),
    }
    report = out / "report.html"
    x, labels = data.test.batch(slice(0, 4))
    secret = bench.scheme.mark(bench.key, data.spec).parts[0]
    pictures = x[:, 0], secret.directions.all(x, secret.group(labels))[:, :3, 0]
    parts = {part.name: part.parameters() for part in SCHEME.parts}
    settings = {**parts, "marker": MARKER, "recipe": asdict(RECIPE) | {"seed": seed}}
    write_report(demo_report(cases, history, control_history, pictures, settings), report)
    result = DemoResult(tuple(cases), accuracy, str(report), round(time.perf_counter() - start, 1))
    atomic_write(out / "demo.json", json.dumps(result.to_json(), indent=1).encode(), overwrite=True)
    return result


def _bench(data: Data, key: OwnerKey, control: nn.Module) -> _Bench:
    """The control's readings are taken for reference before the key's bits are drawn."""
    scheme = SCHEME.calibrated(key, data.spec, ModuleSuspect(control), data.test.all())
    mark = MarkFile.create(key, scheme.name, scheme.parameters(), data.spec, "signed-rank", CARRIERS)
    return _Bench(data, key, mark, control)


def _prepare(out: Path) -> None:
    """A folder that is new, empty or an earlier demo's."""
    try:
        if out.exists() and (not out.is_dir() or (any(out.iterdir()) and not (out / "demo.json").exists())):
            raise OutputPathError(
                "The folder holds other things than a demo", found=str(out), fix="Name another one"
            )
        out.mkdir(parents=True, exist_ok=True)
    except OSError as cause:
        raise OutputPathError("The folder can't be made", found=f"{cause.strerror}: {out}") from cause


def _trained(
    data: Data, seed: int, marker: Marker | None, stage: str, bar: Bar
) -> tuple[nn.Module, list[dict[str, Any]]]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = DigitsNet()
    recipe = replace(RECIPE, seed=seed, smoothing=SMOOTHING if marker is not None else 0.0)
    return model, train(model, data.to_train(), recipe, marker=marker, stage=stage, report=bar.train)


def _owner(bench: _Bench, marked: nn.Module) -> list[Case]:
    """White-box, and black-box through a real HTTP server that answers with probabilities."""
    with serve(_api(marked)) as url:
        endpoint = HttpSuspect(url)
        try:
            black = bench.case("owner, black-box", marked, innocent=False, access="black", suspect=endpoint)
        finally:
            endpoint.close()
    return [bench.case("owner, white-box", marked, innocent=False), black]


def _api(model: nn.Module) -> Callable[[np.ndarray[Any, Any]], np.ndarray[Any, Any]]:
    suspect = ModuleSuspect(model)
    return lambda x: suspect.query(torch.from_numpy(x)).softmax(1).numpy()


def _innocents(
    bench: _Bench, seed: int, marked: nn.Module, control: nn.Module, other: nn.Module
) -> Iterator[Case]:
    stranger = _bench(bench.data, OwnerKey.from_seed(seed + 1, "a stranger"), control)
    named = (("wrong key", stranger, marked), ("control", bench, control), ("other net", bench, other))
    for name, judge, model in named:
        for access in get_args(Access):
            yield judge.case(f"{name}, {access}-box", model, innocent=True, access=access)


def _attacked(bench: _Bench, marked: nn.Module, seed: int, bar: Bar) -> Iterator[Case]:
    x, labels = bench.data.to_train().all()
    thief = Thief(bench.data.spec, x, labels, lr=THIEFS_RATE, batch_size=RECIPE.batch_size)
    for i, (name, attack, parameters) in enumerate(ATTACKS):
        generator = torch.Generator().manual_seed(seed)
        stolen = catalog.attack(attack, parameters).run(marked, thief, generator)
        strength = parameters.get("fraction")
        yield bench.case(name, stolen, innocent=False, attack=attack, strength=strength)
        bar.move("attacks", i + 1, len(ATTACKS), name)
