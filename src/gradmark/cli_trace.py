"""The commands that make licensees' copies and tell them apart: ``license`` and ``trace``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from gradmark.errors import UsageError
from gradmark.terminal import Data, Json, Key, Passphrase, Seed, command, err, key_of, settings, show

Licensees = Annotated[
    Path | None, typer.Option(help="A file of licensees: one name a line, a .json list, or a .csv.")
]


@command(
    "gradmark license --mark signed/mark.json --licensee globex --model nets:net --data d.npz "
    "--key acme.key --out copies"
)
def license(
    mark: Annotated[Path, typer.Option(help="The mark.json of the marked model that is to be copied.")],
    model: Annotated[str, typer.Option(help="MODULE:FACTORY, a function that returns the torch model.")],
    data: Data,
    key: Key,
    out: Annotated[Path, typer.Option(help="Folder for the copies; those already in it stay.")],
    licensee: Annotated[list[str] | None, typer.Option(help="Who gets a copy; may be repeated.")] = None,
    licensees: Licensees = None,
    weights: Annotated[
        Path | None, typer.Option(help="The marked model; default: model.safetensors beside the mark.")
    ] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="NAME=VALUE: an option of the tracing mark's probes.")
    ] = None,
    epochs: Annotated[int | None, typer.Option(help="Of a copy's fine-tune; default 5.", min=1)] = None,
    lr: Annotated[float | None, typer.Option(help="Learning rate; default 0.001.")] = None,
    batch_size: Annotated[int | None, typer.Option(min=2)] = None,
    optimizer: Annotated[str | None, typer.Option(help="adamw or sgd.")] = None,
    augment: Annotated[str | None, typer.Option(help="none, shift or shift-flip.")] = None,
    smoothing: Annotated[float, typer.Option(help="Label smoothing, as the marked model had.")] = 0.1,
    strength: Annotated[float, typer.Option(help="How hard the licensee's bits are pushed.")] = 1.0,
    anchor: Annotated[float, typer.Option(help="How firmly a copy is held to the model's answers.")] = 5.0,
    passphrase_file: Passphrase = None,
    seed: Seed = 0,
    as_json: Json = False,
) -> int:
    """Make a copy of a marked model for each licensee, so that a leaked one can be told from the others."""
    from gradmark.commands.license import LicenseJob, licensed, run_license
    from gradmark.trace import checked, read_licensees

    if (licensees is None) == (not licensee):
        raise UsageError("Who gets a copy?", expected="--licensee NAME, or --licensees FILE")
    names = read_licensees(licensees) if licensees is not None else checked(licensee or [])
    job = LicenseJob(
        mark, model, data, key_of(key, passphrase_file), tuple(names), out, weights, settings(set_ or []),
        epochs, lr, batch_size, optimizer, augment, smoothing, strength, anchor, seed,
    )  # fmt: skip
    done = run_license(job, err())
    return show(0 if done.sound else 3, as_json, done.to_json(), *licensed(done))


@command("gradmark trace leaked.pt2 --licensees all.txt --key acme.key --mark signed/mark.json --data d.npz")
def trace(
    suspect: Annotated[
        str, typer.Argument(help="A .pt2, .onnx or .safetensors file, or an http(s):// endpoint.")
    ],
    licensees: Annotated[
        Path, typer.Option(help="Every licensee: one name a line, a .json list, or a .csv.")
    ],
    key: Key,
    mark: Annotated[Path, typer.Option(help="The mark.json of the model that the copies were made from.")],
    data: Data,
    trace_mark: Annotated[
        Path | None,
        typer.Option("--trace", help="The copies' tracing mark; default: trace.json beside the mark."),
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="MODULE:FACTORY, for a suspect that is weights only.")
    ] = None,
    access: Annotated[str | None, typer.Option(help="white or black; default: white if it can be.")] = None,
    queries: Annotated[
        int, typer.Option(help="Inputs that may be sent, for black-box access.", min=8)
    ] = 2000,
    alpha: Annotated[float, typer.Option(help="The chance, at most, that any innocent is named.")] = 1e-6,
    keys_tried: Annotated[
        int, typer.Option(help="Keys or suspects tried in this search; p is multiplied by it.", min=1)
    ] = 1,
    ranking: Annotated[
        Path | None, typer.Option(help="Write every licensee's p to this .csv; for your eyes.")
    ] = None,
    report: Annotated[Path | None, typer.Option(help="Write a report, .html or .pdf.")] = None,
    journal: Annotated[Path | None, typer.Option(help="Keep an endpoint's answers in this file.")] = None,
    batch_size: Annotated[int, typer.Option(help="Inputs in one request to an endpoint.", min=1)] = 64,
    timeout: Annotated[
        float, typer.Option(help="Seconds to wait for an endpoint's answer.", min=0.01)
    ] = 30.0,
    header: Annotated[list[str] | None, typer.Option(help="'NAME: VALUE' for an endpoint, or @FILE.")] = None,
    api: Annotated[str, typer.Option(help="What an endpoint speaks: json, oip, or a FILE.toml.")] = "json",
    passphrase_file: Passphrase = None,
    seed: Seed = 0,
    as_json: Json = False,
) -> int:
    """Ask which licensee's copy a suspect is. Exit code 0: one is named; 1: no evidence; 3: inconclusive."""
    from gradmark.commands.trace import CODES, TraceJob, run_trace, traced
    from gradmark.commands.verify import Endpoint, parse_headers
    from gradmark.suspects import public_name

    job = TraceJob(
        suspect, licensees, data, key_of(key, passphrase_file), mark, trace_mark, model,
        access, queries, alpha, keys_tried, seed, report, ranking,  # type: ignore[arg-type]
        Endpoint(batch_size, timeout, journal, parse_headers(header or []), api),
    )  # fmt: skip
    found = run_trace(job, err())
    return show(CODES[found.outcome], as_json, found.to_json(), *traced(found, public_name(suspect), report))
