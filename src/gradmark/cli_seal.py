"""The commands for tamper evidence: ``seal`` and ``check``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from gradmark.terminal import Json, Key, Passphrase, Seed, command, err, key_of, show

SEAL_CODES = {"intact": 0, "modified": 1, "other": 1, "inconclusive": 3}
Factory = Annotated[
    str | None,
    typer.Option("--model", help="MODULE:FACTORY of the network, for files that are weights only."),
]


@command(
    "gradmark seal signed/model.safetensors --model nets:net --data d.npz --key acme.key --out model.seal"
)
def seal(
    subject: Annotated[str, typer.Argument(metavar="MODEL", help="The model to seal: .pt2 or .safetensors.")],
    key: Key,
    out: Annotated[Path, typer.Option(help="The seal to write; never overwritten. Keep it private.")],
    model: Factory = None,
    data: Annotated[
        str | None, typer.Option(help="Inputs to make probes from: as for verify. Else keyed noise is.")
    ] = None,
    mark: Annotated[
        Path | None, typer.Option(help="Instead of --data: the mark.json that embed wrote.")
    ] = None,
    shape: Annotated[
        str | None,
        typer.Option(help="Instead of --data: one input's shape, as 3,32,32 (8-bit images in [0, 1])."),
    ] = None,
    probes: Annotated[
        int, typer.Option(help="Sensitive inputs; 0 makes a seal that may be published.", min=0, max=1000)
    ] = 10,
    passphrase_file: Passphrase = None,
    seed: Seed = 0,
    as_json: Json = False,
) -> int:
    """Seal a model, so that any later change of it can be told, from its file or from its answers."""
    from gradmark.commands.seal import SealJob, run_seal, sealed_json
    from gradmark.commands.summary import sealed

    job = SealJob(subject, key_of(key, passphrase_file), out, model, data, mark, shape, probes)
    made = run_seal(job, err())
    return show(0, as_json, sealed_json(made, out), *sealed(made, out))


@command("gradmark check suspect.pt2 --seal model.seal")
def check(
    suspect: Annotated[
        str, typer.Argument(help="A .pt2, .onnx or .safetensors file, or an http(s):// endpoint.")
    ],
    seal: Annotated[Path, typer.Option(help="The seal that seal wrote.")],
    model: Factory = None,
    access: Annotated[str | None, typer.Option(help="white or black; default: white if it can be.")] = None,
    key: Annotated[Path | None, typer.Option(help="Take only a seal that this owner's key made.")] = None,
    report: Annotated[Path | None, typer.Option(help="Write a report, .html or .pdf.")] = None,
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
    """Ask whether a model was changed since it was sealed. Exit code 0: intact; 1: broken; 3: undecided."""
    from gradmark.commands.seal import CheckJob, run_check
    from gradmark.commands.summary import checked
    from gradmark.commands.verify import Endpoint, parse_headers
    from gradmark.suspects import public_name

    job = CheckJob(
        suspect, seal, model, access,  # type: ignore[arg-type]
        None if key is None else key_of(key, passphrase_file), report,
        Endpoint(batch_size, timeout, None, parse_headers(header or []), api),
    )  # fmt: skip
    found = run_check(job, err())
    return show(
        SEAL_CODES[found.outcome], as_json, found.to_json(), *checked(found, public_name(suspect), report)
    )
