"""The command line: parses, calls, prints. The work is done in :mod:`gradmark.commands` and ``demo``.

Exit codes: 0 mark found, 1 no evidence, 3 inconclusive, 2 it could not be done. Heavy imports wait
until a command needs them, so that ``--help`` is quick.
"""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Annotated

import typer

from gradmark.errors import UsageError
from gradmark.terminal import (
    CODES,
    Device,
    Json,
    Key,
    Passphrase,
    Seed,
    SomeData,
    Task,
    app,
    ask,
    command,
    err,
    key_of,
    settings,
    show,
    task_or,
)  # fmt: skip


@command('gradmark keygen --owner "Acme Ltd" --out acme.key')
def keygen(
    owner: Annotated[str, typer.Option(help="Who owns what is marked; part of every claim.")],
    out: Annotated[Path, typer.Option(help="The key file to write; never overwritten.")],
    passphrase_file: Passphrase = None,
    no_passphrase: Annotated[
        bool, typer.Option("--no-passphrase", help="Leave the key unprotected.")
    ] = False,
    seed: Annotated[
        int | None, typer.Option(help="A throw-away key for tests: whoever knows N has it.")
    ] = None,
    as_json: Json = False,
) -> int:
    """Make an owner's key: 256 secret bits in a protected file."""
    from gradmark.commands.keygen import make_key, new_passphrase

    if no_passphrase and passphrase_file:
        raise UsageError("--passphrase-file and --no-passphrase exclude each other")
    passphrase = None if no_passphrase else new_passphrase(out, passphrase_file, ask)
    made = make_key(owner, out, passphrase, seed=seed)
    if seed is not None:
        err().print(
            "warning: a key made from a seed protects nothing; use it for tests only", highlight=False
        )
    how = "protected by your passphrase" if made.protected else "NOT protected"
    return show(
        0, as_json, made.to_json(), f"Key of {made.owner} in {made.path}, {how}. Keep a copy in a safe place."
    )


@command("gradmark demo --out demo-out")
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the report.")] = Path("demo-out"),
    seed: Seed = 0,
    as_json: Json = False,
) -> int:
    """Mark a small network, attack it, and judge it: half a minute or so."""
    from gradmark.demo import run_demo

    result = run_demo(out, seed, err())
    return show(0 if result.as_expected else 1, as_json, result.to_json(), *result.shown())


@command("gradmark embed --model nets:resnet20 --data cifar.npz --key acme.key --out signed")
def embed(
    key: Key,
    out: Annotated[
        Path, typer.Option(help="New folder for model, control, mark.json, run.json and report.html.")
    ],
    model: Annotated[
        str | None, typer.Option(help="MODULE:FACTORY, a function that returns the torch model.")
    ] = None,
    data: SomeData = None,
    task: Task = None,
    weights: Annotated[Path | None, typer.Option(help="Fine-tune these .safetensors weights.")] = None,
    scheme: Annotated[str, typer.Option(help="How the bits are carried; A,B for several ways.")] = "ensemble",
    bits: Annotated[int | None, typer.Option(help="Bits in the mark.", min=1)] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="NAME=VALUE: an option of the scheme.")
    ] = None,
    target_p: Annotated[float | None, typer.Option(help="The p-value to aim at; else the scheme's.")] = None,
    smoothing: Annotated[float, typer.Option(help="Label smoothing of the marked model.")] = 0.1,
    calibrate: Annotated[
        bool, typer.Option("--calibrate", help="Fold a temperature in: as confident as the control.")
    ] = False,
    budget: Annotated[float, typer.Option(help="Points of accuracy that the mark may cost.")] = 0.5,
    epochs: Annotated[int | None, typer.Option(help="Default 30, or 5 with --weights.", min=1)] = None,
    lr: Annotated[
        float | None, typer.Option(help="Learning rate; a quarter of the default with --weights.")
    ] = None,
    batch_size: Annotated[int | None, typer.Option(min=2)] = None,
    optimizer: Annotated[str | None, typer.Option(help="adamw or sgd.")] = None,
    augment: Annotated[str | None, typer.Option(help="none, shift or shift-flip.")] = None,
    strength: Annotated[
        float | None, typer.Option(help="The mark's strength by hand, instead of --budget.")
    ] = None,
    margin: Annotated[
        float | None, typer.Option(help="Reading, in logits, at which an input counts as marked.")
    ] = None,
    carriers: Annotated[
        int | None, typer.Option(help="Inputs of a batch that carry the mark; default 32.", min=1)
    ] = None,
    every: Annotated[
        int | None,
        typer.Option(help="Push on every N-th step; default 4, 1 is strongest.", min=1),
    ] = None,
    rehearse: Annotated[
        float | None,
        typer.Option(
            help="Against retraining: the rate of thieves who train copies meanwhile, as your --lr."
        ),
    ] = None,
    soften: Annotated[
        float | None,
        typer.Option(help="Weight of answering blurred and faded images as the images themselves."),
    ] = None,
    keyed_labels: Annotated[
        str,
        typer.Option(help="Let the key spread what smoothing takes from the labels: alone or beside a push."),
    ] = "",
    hardened: Annotated[
        bool,
        typer.Option("--hardened", help="Against retraining, and for blurred images: see the reference."),
    ] = False,
    method: Annotated[str, typer.Option(help="auto, exact or central-difference.")] = "auto",
    device: Device = "cpu",
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an interrupted run.")] = False,
    export_triggers: Annotated[
        Path | None, typer.Option(help="Train nothing: write triggers to mix into any training, .npz.")
    ] = None,
    passphrase_file: Passphrase = None,
    seed: Seed = 0,
    as_json: Json = False,
) -> int:
    """Train a model that carries your mark, and an unmarked control to see what it cost."""
    from gradmark.commands.embed import EmbedJob, run_embed
    from gradmark.commands.export import ExportJob, run_export
    from gradmark.commands.summary import embedded

    if export_triggers is not None:
        way = "trigger" if scheme == "ensemble" else scheme
        options = settings(set_ or [])
        source = task_or(None, data, "--data")
        written = run_export(
            ExportJob(source, key_of(key, passphrase_file), out, export_triggers, way, bits, options)
        )
        return show(0, as_json, written.to_json(), *written.shown())
    job = EmbedJob(
        task_or(task, model, "--model"), task_or(task, data, "--data"), key_of(key, passphrase_file), out,
        weights, scheme, bits, settings(set_ or []), target_p, budget, epochs, lr, batch_size, optimizer,
        augment, strength, margin, smoothing, calibrate, method, seed, resume, device, task, carriers, every,
        rehearse, soften, hardened, keyed_labels,
    )  # fmt: skip
    done = run_embed(job, err())
    return show(CODES[done.verdict.outcome], as_json, done.to_json(), *embedded(done))


@command("gradmark verify suspect.pt2 --key acme.key --mark signed/mark.json --data cifar.npz")
def verify(
    suspect: Annotated[
        str,
        typer.Argument(
            help="A .pt2, .onnx, .safetensors (or its index), .gguf or .pt file, or an http(s):// endpoint."
        ),
    ],
    data: SomeData = None,
    task: Task = None,
    key: Annotated[Path | None, typer.Option("--key", help="The owner's key file.")] = None,
    mark: Annotated[Path | None, typer.Option(help="The mark.json that embed wrote.")] = None,
    linear_mark: Annotated[
        Path | None, typer.Option(help="A gradient mark made by other software, .npz.")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="MODULE:FACTORY, for a suspect that is weights only.")
    ] = None,
    access: Annotated[str | None, typer.Option(help="white or black; default: white if it can be.")] = None,
    queries: Annotated[
        int, typer.Option(help="Inputs that may be sent, for black-box access.", min=2)
    ] = 2000,
    sequential: Annotated[
        bool, typer.Option("--sequential", help="Ask in rounds and stop as soon as the evidence suffices.")
    ] = False,
    alpha: Annotated[float, typer.Option(help="The p-value at which the mark counts as found.")] = 1e-6,
    keys_tried: Annotated[
        int, typer.Option(help="Keys tried in this search; p is multiplied by it.", min=1)
    ] = 1,
    seal: Annotated[
        Path | None, typer.Option(help="The model's seal: tells as well whether it was modified.")
    ] = None,
    report: Annotated[Path | None, typer.Option(help="Write a report, .html or .pdf.")] = None,
    journal: Annotated[Path | None, typer.Option(help="Keep an endpoint's answers in this file.")] = None,
    batch_size: Annotated[int, typer.Option(help="Inputs in one request to an endpoint.", min=1)] = 64,
    timeout: Annotated[
        float, typer.Option(help="Seconds to wait for an endpoint's answer.", min=0.01)
    ] = 30.0,
    header: Annotated[list[str] | None, typer.Option(help="'NAME: VALUE' for an endpoint, or @FILE.")] = None,
    api: Annotated[
        str, typer.Option(help="What an endpoint speaks: json, oip, or a FILE.toml that says.")
    ] = "json",
    concurrency: Annotated[int, typer.Option(help="Requests under way at once.", min=1, max=64)] = 1,
    rate: Annotated[float | None, typer.Option(help="Requests a second, at most.", min=0.001)] = None,
    passphrase_file: Passphrase = None,
    seed: Seed = 0,
    as_json: Json = False,
) -> int:
    """Ask whether a suspect carries your mark. Exit code 0: yes; 1: no evidence; 3: inconclusive."""
    from gradmark.commands.summary import verified
    from gradmark.commands.verify import Endpoint, VerifyJob, parse_headers, run_verify
    from gradmark.suspects import public_name

    job = VerifyJob(
        suspect, task_or(task, data, "--data"), None if key is None else key_of(key, passphrase_file), mark,
        linear_mark, model, access, queries, alpha, keys_tried, seed, report,  # type: ignore[arg-type]
        Endpoint(batch_size, timeout, journal, parse_headers(header or []), api, concurrency, rate),
        sequential, seal, task,
    )  # fmt: skip
    verdict = run_verify(job, err())
    return show(
        CODES[verdict.outcome],
        as_json,
        verdict.to_json(),
        *verified(verdict, public_name(suspect), report, seal),
    )


def main() -> None:
    """The ``gradmark`` command."""
    if not sys.warnoptions:
        warnings.simplefilter("ignore")  # torch and its exporters warn of what users can't change
    app()


import gradmark.cli_audit  # noqa: E402
import gradmark.cli_bench  # noqa: E402
import gradmark.cli_claim  # noqa: E402
import gradmark.cli_preflight  # noqa: E402
import gradmark.cli_seal  # noqa: E402
import gradmark.cli_trace  # noqa: E402, F401  more commands, listed after these

if __name__ == "__main__":
    main()
