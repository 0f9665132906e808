"""The command that looks before training starts: ``preflight``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from gradmark.terminal import FAILED, Data, Device, Json, Seed, command, settings, show


@command("gradmark preflight --model nets:resnet20 --data cifar.npz --precision bfloat16 --compile")
def preflight(
    model: Annotated[str, typer.Option(help="MODULE:FACTORY, a function that returns the torch model.")],
    data: Data,
    weights: Annotated[Path | None, typer.Option(help="Start from these .safetensors weights.")] = None,
    scheme: Annotated[str, typer.Option(help="How the bits are carried; A,B for several ways.")] = "ensemble",
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="NAME=VALUE: an option of the scheme.")
    ] = None,
    method: Annotated[str, typer.Option(help="auto, exact or central-difference.")] = "auto",
    device: Device = "cpu",
    precision: Annotated[str, typer.Option(help="float32, bfloat16 or float16 autocast.")] = "float32",
    compile_: Annotated[bool, typer.Option("--compile", help="As torch.compile leaves the model.")] = False,
    seed: Seed = 0,
    as_json: Json = False,
) -> int:
    """Check that the mark's gradient is right on your model. Exit code 0: it is; 2: it can't be, and why."""
    from gradmark.commands.preflight import PreflightJob, run_preflight, shown

    job = PreflightJob(
        model, data, weights, scheme, settings(set_ or []), method, device, precision, compile_, seed
    )
    found = run_preflight(job)
    return show(0 if found.method else FAILED, as_json, found.to_json(), *shown(found))
