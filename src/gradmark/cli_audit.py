"""The command that looks at a marked model as a stranger would: ``audit``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from gradmark.terminal import Data, Json, Seed, command, err, show


@command("gradmark audit signed/model.safetensors --control plain.safetensors --model nets:net --data d.npz")
def audit(
    subject: Annotated[
        str, typer.Argument(metavar="MODEL", help="The marked model: .safetensors, .pt2 or .onnx.")
    ],
    control: Annotated[str, typer.Option(help="The same training without the mark.")],
    data: Data,
    model: Annotated[
        str | None, typer.Option(help="MODULE:FACTORY of the network, for files that are weights only.")
    ] = None,
    mark: Annotated[
        Path | None, typer.Option(help="The mark.json that embed wrote: names the scheme to look for.")
    ] = None,
    queries: Annotated[int, typer.Option(help="Probes whose looks are judged.", min=100)] = 2000,
    report: Annotated[Path | None, typer.Option(help="Write a report, .html or .pdf.")] = None,
    seed: Seed = 0,
    as_json: Json = False,
) -> int:
    """Ask whether a mark can be found without its key, and what it does to the model."""
    from gradmark.commands.audit import AuditJob, audited, run_audit

    job = AuditJob(subject, control, data, model, mark, queries, seed, report)
    found = run_audit(job, err())
    return show(0, as_json, found.to_json(), *audited(found, report))
