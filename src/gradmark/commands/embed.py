"""``gradmark embed``: train a control, train the marked model likewise, prove the mark, write it all down."""

from __future__ import annotations

import copy
import json
import platform
import shutil
import time
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch import nn

from gradmark import catalog
from gradmark._version import __version__
from gradmark.codec import MarkFile, atomic_write
from gradmark.commands.job import CARRIERS, TEST, EmbedJob, fitting, identity
from gradmark.commands.progress import Bar
from gradmark.commands.verify import need_for_reports
from gradmark.commands.work import Work
from gradmark.data import Data
from gradmark.embed import Check, Marker, Recipe, accuracy_of, choose_method, train
from gradmark.embed.temper import confidence_of, temper
from gradmark.errors import OutputPathError
from gradmark.protocols import Scheme, Verdict
from gradmark.report import embed_report, write_report
from gradmark.stats import wilson_interval
from gradmark.suspects import ModuleSuspect, file_digest, save_weights
from gradmark.verify import verify
from gradmark.views import suspected, viewed

AIM = -15.0
"""log10 p that an embedding is measured against where the user states none."""


@dataclass(frozen=True)
class Embedded:
    """What came of it: ``run`` is what run.json holds."""

    run: dict[str, Any]
    verdict: Verdict
    files: dict[str, str]

    def to_json(self) -> dict[str, Any]:
        return {**self.run, "files": self.files}


def run_embed(job: EmbedJob, console: Console) -> Embedded:
    """Do ``job``; progress goes to ``console``.

    After a KeyboardInterrupt or a kill, ``job.resume`` goes on to the result that an uninterrupted run
    gives, and so it does after any other failure once the control is trained, such as a full disk at the end;
    a fresh run that fails before leaves nothing in ``job.out``.
    """
    need_for_reports()
    if job.out.exists() and not job.resume:
        fix = "Name a new folder, or give --resume to go on with an interrupted run"
        raise OutputPathError("The output folder exists already", found=str(job.out), fix=fix)
    recipe = job.recipe()
    data, model = fitting(job)
    scheme, task = job.scheme_value(data.spec), job.task_value()
    x, labels = task.carriers(data.to_train().batch(slice(0, 8)))
    few = x.to(job.device), labels.to(job.device)
    mark = scheme.mark(job.key, data.spec)
    method = choose_method(scheme, mark, viewed(task, model), few, job.method)
    job.marker(scheme, data, method.method)  # this and the next refuse nonsense before the control is trained
    replace(recipe, smoothing=job.smoothing)
    work = Work(job.out, identity(job, recipe, scheme, data, model))
    work.open(resume=job.resume)
    try:
        return _embed(job, recipe, scheme, data, model, method, work, console)
    except KeyboardInterrupt:
        raise
    except BaseException:
        if not job.resume and not work.has("control"):
            shutil.rmtree(job.out, ignore_errors=True)
        raise


def _embed(
    job: EmbedJob,
    recipe: Recipe,
    scheme: Scheme,
    data: Data,
    model: nn.Module,
    method: Check,
    work: Work,
    console: Console,
) -> Embedded:
    with Bar(console) as bar:
        control = work.load("control")
        if control is None:
            control = _control(copy.deepcopy(model), data, recipe, scheme, job, work, bar)
            work.save("control", control)
        mark = work.mark(lambda: _mark(job, scheme, data))
        scheme = catalog.scheme(mark.scheme, mark.scheme_parameters)
        marker = job.marker(scheme, data, method.method)
        start = time.perf_counter()
        soft = replace(recipe, smoothing=job.smoothing)
        history = _train(model, data, soft, job, marker, "marked", work, bar)
        factor = temper(model, data.to_train(), control["confidence"]) if job.calibrate else 1.0
        marked, verdict = _measured(model, "marked", data, mark, job, history, start)
    points = 100 * (control["accuracy"][0] - marked["accuracy"][0])
    run = {
        "outcome": verdict.outcome,
        "accuracy": {"marked": marked["accuracy"], "control": control["accuracy"]},
        "cost_points": round(points, 4),
        "budget": job.budget,
        "within_budget": points <= job.budget,
        "target_log10_p": AIM if job.target_p is None else marker.target_log10_p,
        "verdict": verdict.to_json(),
        "control_verdict": control["verdict"],
        "seed": job.seed,
        "recipe": asdict(recipe),
        "smoothing": job.smoothing,
        "temperature": 1 / factor,
        "confidence": {"marked": _confidence(model, data, job), "control": control["confidence"]},
        "utility": {"marked": marked.get("utility"), "control": control.get("utility")},
        "scheme": {"name": scheme.name, "parameters": scheme.parameters()},
        "strength": marker.strength,
        "margin": marker.margin,
        "push": {
            "carriers": marker.carriers,
            "every": marker.every,
            "rehearse": marker.rehearsal and marker.rehearsal.rate,
            "soften": marker.soften,
            "keyed_labels": job.keyed_labels,
        },
        "preflight": asdict(method),
        "seconds": {"marked": marked["seconds"], "control": control["seconds"]},
        "resumed": job.resume,
        "model": {"factory": job.model, "weights": None if job.weights is None else job.weights.name},
        "data": job.data,
        "task": job.task,
        "owner": job.key.owner,
        "key_id": job.key.key_id,
        "history": {"marked": marked["history"], "control": control["history"]},
        "versions": versions(),
    }
    return Embedded(run, verdict, _write(job, model, mark, run, verdict, work))


def _mark(job: EmbedJob, scheme: Scheme, data: Data) -> MarkFile:
    return MarkFile.create(job.key, scheme.name, scheme.parameters(), data.spec, TEST, CARRIERS)


def _control(
    model: nn.Module, data: Data, recipe: Recipe, scheme: Scheme, job: EmbedJob, work: Work, bar: Bar
) -> dict[str, Any]:
    """Train the unmarked network; the mark takes its readings for reference, and only then has bits."""
    start = time.perf_counter()
    history = _train(model, data, recipe, job, None, "control", work, bar)
    if hasattr(scheme, "calibrated"):
        task = job.task_value()
        seen = ModuleSuspect(viewed(task, model))
        scheme = scheme.calibrated(job.key, data.spec, seen, task.carriers(data.test.all()))
    mark = work.mark(lambda: _mark(job, scheme, data))
    measured = _measured(model, "control", data, mark, job, history, start)[0]
    save_weights(model, job.out / "control.safetensors")
    return {**measured, "confidence": _confidence(model, data, job)}


def _confidence(model: nn.Module, data: Data, job: EmbedJob) -> float | None:
    """Mean confidence in training inputs; None where no classes are named."""
    return confidence_of(model, data.to_train()) if job.task is None else None


def _train(
    model: nn.Module, data: Data, recipe: Recipe, job: EmbedJob, marker: Marker | None, stage: str,
    work: Work, bar: Bar,
) -> list[dict[str, Any]]:  # fmt: skip
    """Train one of the two, in place."""
    return train(
        model, data.to_train(), recipe, marker=marker, task=job.task_value(), stage=stage,
        checkpoint=work.checkpoint(stage), report=bar.train,
    )  # fmt: skip


def _measured(
    model: nn.Module, stage: str, data: Data, mark: MarkFile, job: EmbedJob, history: Any, start: float
) -> tuple[dict[str, Any], Verdict]:
    """Accuracy, or a task's own utility, and verdict on the inputs that nothing is trained on."""
    seconds, task = round(time.perf_counter() - start, 3), job.task_value()
    if job.task is None:
        right, n = accuracy_of(model, data.test)
        worth = {}
    else:
        found = task.utility(model)
        right, n, worth = round(found.percent * found.n / 100), found.n, {"utility": asdict(found)}
    suspect = suspected(task, ModuleSuspect(model, name=stage))
    verdict = verify(mark, job.key, suspect, task.carriers(data.test.all()))
    row = {
        **worth,
        "accuracy": [right / n, *wilson_interval(right, n)],
        "seconds": seconds,
        "history": history,
        "verdict": verdict.to_json(),
    }
    return row, verdict


def _write(
    job: EmbedJob, model: nn.Module, mark: MarkFile, run: dict[str, Any], verdict: Verdict, work: Work
) -> dict[str, str]:
    """The files of the contract, beside the control; the work folder goes last."""
    files = {name: job.out / name for name in ("model.safetensors", "mark.json", "run.json", "report.html")}
    save_weights(model, files["model.safetensors"])
    verdict = replace(verdict, suspect=file_digest(files["model.safetensors"]))  # as verify will name it
    run["verdict"] = verdict.to_json()
    mark.save(files["mark.json"], overwrite=True)
    text = json.dumps(run, indent=1, allow_nan=False, default=str) + "\n"
    atomic_write(files["run.json"], text.encode(), overwrite=True)
    info = {
        "owner": job.key.owner,
        "scheme": run["scheme"]["name"],
        "parameters": run["scheme"]["parameters"],
        "accuracy": run["accuracy"],
        "epochs": run["recipe"]["epochs"],
        "seed": job.seed,
        "budget": job.budget,
        "seconds": sum(run["seconds"].values()),
        "target_log10_p": run["target_log10_p"],
        "options": job.other_options(),
    }
    history = run["history"]
    write_report(embed_report(info, verdict, history["marked"], history["control"]), files["report.html"])
    work.close()
    control = job.out / "control.safetensors"
    files |= {control.name: control} if control.exists() else {}
    return {name.partition(".")[0]: str(path) for name, path in files.items()}


def versions() -> dict[str, str]:
    """What the numbers were made with."""
    return {
        "gradmark": __version__,
        "torch": str(torch.__version__),
        "numpy": np.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "threads": str(torch.get_num_threads()),
    }


__all__ = ["EmbedJob", "Embedded", "run_embed", "versions"]
