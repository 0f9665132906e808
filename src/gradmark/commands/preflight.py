"""``gradmark preflight``: is the penalty right on this model, before anything is trained?"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import nn

from gradmark import catalog
from gradmark.commands.job import EmbedJob, fitting
from gradmark.embed.surroundings import Preflight, survey
from gradmark.errors import UsageError
from gradmark.keys import OwnerKey

PRECISIONS = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class PreflightJob:
    """What ``embed`` would be given, and how training will run: device, precision, ``compile``."""

    model: str
    data: str
    weights: Path | None = None
    scheme: str = catalog.FLAGSHIP
    options: tuple[tuple[str, Any], ...] = ()
    method: str = "auto"
    device: str = "cpu"
    precision: str = "float32"
    compile: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if self.precision not in PRECISIONS:
            raise UsageError("No such precision", expected=", ".join(PRECISIONS), found=self.precision)
        if self.method not in ("auto", "exact", "central-difference"):
            raise UsageError(
                "No such method", expected="auto, exact or central-difference", found=self.method
            )

    def autocast(self) -> AbstractContextManager[Any]:
        dtype = PRECISIONS[self.precision]
        return nullcontext() if dtype is None else torch.autocast(torch.device(self.device).type, dtype)


def run_preflight(job: PreflightJob) -> Preflight:
    """Build the model, take a few training inputs and a throw-away key, and look."""
    key = OwnerKey.from_seed(job.seed, "preflight")
    embed = EmbedJob(
        job.model,
        job.data,
        key,
        Path(),
        job.weights,
        job.scheme,
        options=job.options,
        seed=job.seed,
        device=job.device,
    )
    data, model = fitting(embed)
    scheme = embed.scheme_value(data.spec)
    model = _compiled(model, job).train()
    x, labels = data.to_train().batch(slice(0, 64))
    batch = x.to(job.device), labels.to(job.device)
    with job.autocast():
        return survey(scheme, scheme.mark(key, data.spec), model, batch, job.method)


def _compiled(model: nn.Module, job: PreflightJob) -> nn.Module:
    return torch.compile(model) if job.compile else model  # type: ignore[return-value]


def shown(found: Preflight) -> list[Table | str]:
    """What a terminal shows."""
    around = Table("Found", "What gradmark does", title_justify="left")
    for row in found.findings:
        around.add_row(row.what, row.cure)
    judged = Table("Method", "against finite difference", "own precision", "verdict", title_justify="left")
    for check in found.checks:
        own = "" if check.own is None else f"{check.own:.1e}"
        error = f"{check.error:.1e}" if check.error == check.error else ""
        judged.add_row(check.method, error, own, "right" if check.ok else check.reason)
    lines: list[Table | str] = [around] if found.findings else []
    lines += [judged] if found.checks else []
    if found.method is None:
        return [*lines, f"NOT RIGHT: {found.reason}"]
    return [*lines, f"RIGHT: the penalty will be computed by {found.method}."]
