"""The commands of a dispute: ``claim``, for the owner and for whoever checks him, and ``judge``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gradmark.errors import UsageError
from gradmark.terminal import (
    Data,
    Json,
    OpeningsPassphrase,
    Passphrase,
    Seed,
    ask,
    command,
    err,
    key_of,
    show,
)

if TYPE_CHECKING:
    from gradmark.keys import OwnerKey

Certificates = Annotated[
    Path | None,
    typer.Option(help="PEM file with the certificates of time stamp authorities that are believed."),
]


@command(
    "gradmark claim --mark signed/mark.json --key acme.key --model signed/model.safetensors --out claim.json"
)
def claim(
    mark: Annotated[Path | None, typer.Option(help="The mark.json that embed wrote.")] = None,
    key: Annotated[Path | None, typer.Option("--key", help="The owner's key file.")] = None,
    out: Annotated[Path | None, typer.Option(help="The claim, or the opening, to write; a new file.")] = None,
    model: Annotated[
        Path | None, typer.Option(help="The marked model's file, whose digest is bound.")
    ] = None,
    data: Annotated[
        str | None, typer.Option(help="Fix the inputs that suspects are read with: as verify's --data.")
    ] = None,
    queries: Annotated[
        int | None, typer.Option(help="Inputs sent to a suspect that can only be asked; default 2000.", min=2)
    ] = None,
    alpha: Annotated[float | None, typer.Option(help="A threshold below the default of 1e-25.")] = None,
    timestamp: Annotated[
        list[str] | None, typer.Option(help="URL of an RFC 3161 time stamp authority; may be repeated.")
    ] = None,
    stamp: Annotated[Path | None, typer.Option(help="Add time stamps to this claim, into --out.")] = None,
    check: Annotated[Path | None, typer.Option(help="Check this claim, offline.")] = None,
    tsa_certificates: Certificates = None,
    against: Annotated[
        Path | None, typer.Option(help="With --check: another claim. Which is earlier?")
    ] = None,
    disclose: Annotated[Path | None, typer.Option(help="Open this claim to a judge, into --out.")] = None,
    judge_passphrase_file: Annotated[
        Path | None, typer.Option(help="With --disclose: file with the passphrase that you tell the judge.")
    ] = None,
    no_passphrase: Annotated[
        bool, typer.Option("--no-passphrase", help="With --disclose: leave the opening unprotected.")
    ] = False,
    passphrase_file: Passphrase = None,
    seed: Seed = 0,
    as_json: Json = False,
) -> int:
    """State whose mark it is, signed and dated; check such a claim (exit code 0: valid, 1: invalid)."""
    from gradmark.commands import claim as work

    given: dict[str, Any] = {
        "mark": mark, "key": key, "out": out, "model": model, "data": data, "queries": queries,
        "alpha": alpha, "timestamp": timestamp or None, "tsa-certificates": tsa_certificates,
        "against": against, "judge-passphrase-file": judge_passphrase_file,
        "no-passphrase": no_passphrase or None,
    }  # fmt: skip
    mode = _mode(given, {"check": check, "stamp": stamp, "disclose": disclose})

    def opened() -> OwnerKey | None:
        return None if key is None else key_of(key, passphrase_file)

    if mode == "check" and check is not None:
        found = work.run_check(work.CheckJob(check, opened(), mark, model, tsa_certificates, against))
        return show(0 if found.valid else 1, as_json, found.to_json(), *work.checked(found))
    if mode == "stamp" and stamp is not None and out is not None:
        dated = work.stamp_claim(stamp, tuple(timestamp or ()), out)
        return show(0, as_json, dated.to_json(), *dated.shown())
    owner = opened()
    if owner is None or out is None:  # _mode saw to it
        raise UsageError("A claim needs --key and --out")
    if mode == "disclose" and disclose is not None:
        opening = work.disclose(disclose, owner, out, _judges(out, judge_passphrase_file, no_passphrase))
        return show(0, as_json, opening.to_json(), *opening.shown())
    if mark is None:
        raise UsageError("A claim needs --mark")
    more = {name: given[name] for name in ("alpha", "queries") if given[name] is not None}
    made = work.make_claim(
        work.ClaimJob(owner, mark, out, model, data, timestamps=tuple(timestamp or ()), **more)
    )
    return show(0, as_json, made.to_json(), *made.shown())


@command("gradmark judge suspect.pt2 --claim claim.json --opening opening.json --data d.npz --innocent b.pt2")
def judge(
    suspect: Annotated[
        str, typer.Argument(help="A .pt2, .onnx or .safetensors file, or an http(s):// endpoint.")
    ],
    data: Data,
    claim: Annotated[Path, typer.Option(help="The claim.")],
    opening: Annotated[Path, typer.Option(help="Its opening: what claim --disclose wrote.")],
    model: Annotated[
        str | None, typer.Option(help="MODULE:FACTORY, for models that are weights only.")
    ] = None,
    own_data: Annotated[
        bool, typer.Option("--own-data", help="The judge chose DATA, without the parties.")
    ] = False,
    innocent: Annotated[
        list[str] | None,
        typer.Option(help="A model of the same task that can't carry the mark; may be repeated."),
    ] = None,
    tsa_certificates: Certificates = None,
    against: Annotated[Path | None, typer.Option(help="Another's claim to the same model.")] = None,
    report: Annotated[Path | None, typer.Option(help="Write a report, .html or .pdf.")] = None,
    journal: Annotated[Path | None, typer.Option(help="Keep an endpoint's answers in this file.")] = None,
    header: Annotated[list[str] | None, typer.Option(help="'NAME: VALUE' for an endpoint, or @FILE.")] = None,
    api: Annotated[str, typer.Option(help="What an endpoint speaks: json, oip, or a FILE.toml.")] = "json",
    passphrase_file: OpeningsPassphrase = None,
    seed: Seed = 0,
    as_json: Json = False,
) -> int:
    """Judge a suspect by a claim and its disclosed key. Exit code 0: proven; 1: not, or refused; 3: open."""
    from gradmark.claim import Opening
    from gradmark.commands.judge import CODES, JudgeJob, judged, run_judge
    from gradmark.commands.keygen import opened_with
    from gradmark.commands.verify import Endpoint, parse_headers
    from gradmark.suspects import public_name

    found = run_judge(
        JudgeJob(
            suspect, claim, opened_with(Opening.load, opening, passphrase_file, ask), data, model, own_data,
            tuple(innocent or ()), tsa_certificates, against, report,
            Endpoint(journal=journal, headers=parse_headers(header or []), api=api),
        ),
        err(),
    )  # fmt: skip
    return show(CODES[found.outcome], as_json, found.to_json(), *judged(found, public_name(suspect), report))


_NEEDS = {
    "make": ({"mark", "key", "out"}, {"model", "data", "queries", "alpha", "timestamp"}),
    "check": (set(), {"key", "mark", "model", "tsa-certificates", "against"}),
    "stamp": ({"timestamp", "out"}, set()),
    "disclose": ({"key", "out"}, {"judge-passphrase-file", "no-passphrase"}),
}


def _mode(given: dict[str, Any], modes: dict[str, Path | None]) -> str:
    """Which of the four things is wanted; UsageError where options are missing or have no meaning there."""
    named = [name for name, path in modes.items() if path is not None]
    if len(named) > 1:
        raise UsageError("One thing at a time", expected=" or ".join(f"--{name}" for name in modes))
    mode = named[0] if named else "make"
    needs, allows = _NEEDS[mode]
    there = {name for name, value in given.items() if value is not None}
    what = f"gradmark claim --{mode}" if named else "gradmark claim"
    if missing := sorted(needs - there):
        fix = "" if named else "or give --check, --stamp or --disclose a claim"
        raise UsageError(
            f"{what} lacks something", expected=", ".join(f"--{n}" for n in sorted(needs)),
            found=f"no --{', no --'.join(missing)}", fix=fix,
        )  # fmt: skip
    if extra := sorted(there - needs - allows):
        raise UsageError(f"{what} has no use for --{', --'.join(extra)}")
    return mode


def _judges(out: Path, file: Path | None, plain: bool) -> str | None:
    """The judge's passphrase, never the owner's own."""
    from gradmark.commands.keygen import read_passphrase

    if plain and file is not None:
        raise UsageError("--judge-passphrase-file and --no-passphrase exclude each other")
    if plain:
        return None
    found = read_passphrase(file) if file is not None else ask(f"Passphrase of {out}, for the judge", True)
    if found is None:
        raise UsageError(
            "The opening needs a passphrase that you tell the judge",
            expected="--judge-passphrase-file",
            found="none, and no terminal to ask on",
            fix="give the file, or say --no-passphrase",
        )
    return found
