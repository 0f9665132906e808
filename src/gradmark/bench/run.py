"""Running a suite: networks first, then one unit after the other, here, on several cores or on Ray.

Whatever is finished lies in a file of its own, so that a run that was killed loses one attack at most.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from gradmark.bench.cells import finished, networks_of, run_unit
from gradmark.bench.store import Report, Wanted, check, obtain
from gradmark.bench.suite import Suite, Unit
from gradmark.embed import Progress
from gradmark.errors import UsageError

Moved = Callable[[str, int, int, str], None]
"""Told of the stage, units done, units in all, and what was done last."""


def run_suite(
    suite: Suite,
    out: Path,
    *,
    jobs: int = 1,
    ray: str | None = None,
    device: str = "cpu",
    only: str | None = None,
    fresh: bool = False,
    moved: Moved = lambda *_: None,
    report: Report = lambda _: None,
) -> dict[str, int]:
    """Do what isn't finished yet; returns how many networks and units there were to do, and in all.

    ``fresh``: do finished units again as well; networks stay. ``ray``: the address of a cluster (``local``
    starts one here) whose workers see ``out`` under the same path. ``device``: where each process
    computes. Raises what stops everything: unknown names, missing data, a network of other settings or one
    that can't be trained. A failing attack doesn't; its cell says so.
    """
    out = out.resolve()
    units = suite.units(only)
    waves = _missing(units, out / "networks")
    with _workers(jobs, ray) as each:
        total = sum(map(len, waves))
        done = 0
        for wave in waves:
            told = report if jobs == 1 and ray is None else None
            for name in each(_train, [(wanted, out / "networks", told, device) for wanted in wave]):
                done += 1
                moved("networks", done, total, name)
        todo = [u for u in units if fresh or not finished(u, out)]
        for i, place in enumerate(each(_attack, [(unit, out, device) for unit in todo])):
            moved("attacks", i + 1, len(todo), place)
    return {"networks": total, "units": len(todo), "units_in_all": len(units)}


def _missing(units: list[Unit], folder: Path) -> list[list[Wanted]]:
    """Networks to train, in waves: those that others start from, unmarked ones, and marked ones, which may
    be calibrated by the control. ResumeError where one of other settings lies there."""
    wanted = {w.name: w for unit in units for w in networks_of(unit).values()}
    for network in wanted.values():
        check(network, folder)
    missing = [w for w in wanted.values() if not _there(w, folder)]
    first = {f.name: f for w in missing if (f := w.first()) is not None and not _there(f, folder)}
    unmarked = [w for w in missing if w.entry is None]
    return [list(first.values()), unmarked, [w for w in missing if w.entry is not None]]


def _there(wanted: Wanted, folder: Path) -> bool:
    return (folder / f"{wanted.name}.safetensors").exists()


def _train(job: tuple[Wanted, Path, Report | None, str]) -> str:
    wanted, folder, report, device = job
    with one_thread():
        obtain(wanted, folder, report or _silent, device)
    return wanted.name


def _silent(_: Progress) -> None:
    """Nobody is told of single steps where several networks train at once."""


def _attack(job: tuple[Unit, Path, str]) -> str:
    unit, out, device = job
    with one_thread():
        cells = run_unit(unit, out, device)
    error = next((cell["error"] for cell in cells if "error" in cell), "")
    return unit.place + (f": {error}" if error else "")


@contextmanager
def one_thread() -> Iterator[None]:
    """One thread inside: networks this small gain nothing from more, and numbers repeat everywhere.

    And float32 that is float32: an accelerator's readings shouldn't be rounded to ten bits.
    """
    before, short = torch.get_num_threads(), torch.backends.cudnn.allow_tf32
    torch.set_num_threads(1)
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.set_num_threads(before)
        torch.backends.cudnn.allow_tf32 = short


Each = Callable[[Callable[[Any], str], Sequence[Any]], Iterator[str]]
"""Applies a function to each item, in any order, and yields the answers as they come."""


@contextmanager
def _workers(jobs: int, address: str | None) -> Iterator[Each]:
    if address is not None:
        with _ray(address) as each:
            yield each
    elif jobs == 1:
        yield lambda function, items: map(function, items)
    else:
        yield _joblib(jobs)


def _joblib(jobs: int) -> Each:
    try:
        import joblib
    except ImportError as cause:
        raise UsageError("Several jobs need joblib", fix="pip install 'gradmark[bench]'") from cause

    def each(function: Callable[[Any], str], items: Sequence[Any]) -> Iterator[str]:
        parallel = joblib.Parallel(n_jobs=jobs, return_as="generator_unordered", pre_dispatch="all")
        answers: Iterator[str] = parallel(joblib.delayed(function)(item) for item in items)
        return answers

    return each


@contextmanager
def _ray(address: str) -> Iterator[Each]:
    try:
        import ray
    except ImportError as cause:
        raise UsageError("--ray needs ray", fix="pip install 'gradmark[ray]'") from cause
    ours = not ray.is_initialized()
    if ours:
        here = {"include_dashboard": False} if address == "local" else {"address": address}
        ray.init(log_to_driver=False, configure_logging=False, **here)

    def each(function: Callable[[Any], str], items: Sequence[Any]) -> Iterator[str]:
        remote = ray.remote(num_cpus=1)(function)
        waiting = [remote.remote(item) for item in items]
        while waiting:
            ready, waiting = ray.wait(waiting)
            yield from ray.get(ready)

    try:
        yield each
    finally:
        if ours:
            ray.shutdown()
