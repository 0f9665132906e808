"""The command line: parses, calls, prints. The work is done in :mod:`gradmark.commands` and ``demo``.

Exit codes: 0 mark found, 1 no evidence, 3 inconclusive, 2 it could not be done. Heavy imports wait
until a command needs them, so that ``--help`` is quick.
"""

from __future__ import annotations

import functools
import json
import os
import sys
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from gradmark._version import __version__
from gradmark.errors import GradmarkError, UsageError

if TYPE_CHECKING:
    from gradmark.keys import OwnerKey

app = typer.Typer(
    name="gradmark",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    help="Sign a neural network with its own input gradients, and prove that it is yours.",
)
CODES = {"owned": 0, "no-evidence": 1, "inconclusive": 3}
FAILED = 2

Json = Annotated[
    bool, typer.Option("--json", help="Print one JSON object and nothing else on standard output.")
]
Seed = Annotated[int, typer.Option(help="Seed of all that is random.", min=0)]
Key = Annotated[Path, typer.Option("--key", help="The owner's key file.")]
Data = Annotated[str, typer.Option("--data", help="digits, an .npz, a datasets folder or MODULE:FACTORY.")]
Passphrase = Annotated[
    Path | None,
    typer.Option(
        "--passphrase-file", help="File with the key's passphrase; else GRADMARK_PASSPHRASE, else asked for."
    ),
]


def command(example: str) -> Callable[[Callable[..., int]], Callable[..., None]]:
    """Register a command that returns its exit code; every failure becomes one message and exit code 2."""

    def register(run: Callable[..., int]) -> Callable[..., None]:
        @app.command(epilog=f"Example: [bold]{example}[/bold]")
        @functools.wraps(run)
        def wrapped(**options: Any) -> None:
            try:
                code = run(**options)
            except KeyboardInterrupt:
                code = _fail("Interrupted", f"interrupted{_continue(run.__name__, options)}", options)
            except GradmarkError as error:
                code = _fail(type(error).__name__, str(error), options)
            except (typer.Exit, typer.Abort):
                raise
            except Exception as error:  # a bug, or a full disk: it must not look like "no evidence"
                if os.environ.get("GRADMARK_TRACEBACK"):
                    traceback.print_exc()
                first = (str(error).strip().splitlines() or [""])[0]
                hint = "GRADMARK_TRACEBACK=1 shows where."
                code = _fail(
                    type(error).__name__, f"unexpected {type(error).__name__}: {first} ({hint})", options
                )
            raise typer.Exit(code)

        return wrapped

    return register


@app.callback(invoke_without_command=True)
def top(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", is_eager=True)
    ] = False,
) -> None:
    if version:
        typer.echo(f"gradmark {__version__}")
        raise typer.Exit


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
    passphrase = None if no_passphrase else new_passphrase(out, passphrase_file, _ask)
    made = make_key(owner, out, passphrase, seed=seed)
    if seed is not None:
        _err().print(
            "warning: a key made from a seed protects nothing; use it for tests only", highlight=False
        )
    how = "protected by your passphrase" if made.protected else "NOT protected"
    return _show(
        0, as_json, made.to_json(), f"Key of {made.owner} in {made.path}, {how}. Keep a copy in a safe place."
    )


@command("gradmark demo --out demo-out")
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the report.")] = Path("demo-out"),
    seed: Seed = 0,
    as_json: Json = False,
) -> int:
    """Mark a small network, attack it, and judge it: two minutes on two cores."""
    from gradmark.demo import run_demo

    result = run_demo(out, seed, _err())
    return _show(0 if result.as_expected else 1, as_json, result.to_json(), *result.shown())


@command("gradmark embed --model nets:resnet20 --data cifar.npz --key acme.key --out signed")
def embed(
    model: Annotated[str, typer.Option(help="MODULE:FACTORY, a function that returns the torch model.")],
    data: Data,
    key: Key,
    out: Annotated[
        Path, typer.Option(help="New folder for model.safetensors, mark.json, run.json, report.html.")
    ],
    weights: Annotated[Path | None, typer.Option(help="Fine-tune these .safetensors weights.")] = None,
    scheme: Annotated[str, typer.Option(help="The way in which the bits are carried.")] = "filter-gradient",
    bits: Annotated[int | None, typer.Option(help="Bits in the mark.", min=1)] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="NAME=VALUE: an option of the scheme.")
    ] = None,
    target_p: Annotated[float, typer.Option(help="The p-value to aim at.")] = 1e-15,
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
    method: Annotated[str, typer.Option(help="auto, exact or central-difference.")] = "auto",
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an interrupted run.")] = False,
    passphrase_file: Passphrase = None,
    seed: Seed = 0,
    as_json: Json = False,
) -> int:
    """Train a model that carries your mark, and an unmarked control to see what it cost."""
    from gradmark.commands.embed import EmbedJob, run_embed
    from gradmark.commands.summary import embedded

    job = EmbedJob(
        model, data, _key(key, passphrase_file), out, weights, scheme, bits, _settings(set_ or []), target_p,
        budget, epochs, lr, batch_size, optimizer, augment, strength, margin, method, seed, resume,
    )  # fmt: skip
    done = run_embed(job, _err())
    return _show(CODES[done.verdict.outcome], as_json, done.to_json(), *embedded(done))


@command("gradmark verify suspect.pt2 --key acme.key --mark signed/mark.json --data cifar.npz")
def verify(
    suspect: Annotated[
        str, typer.Argument(help="A .pt2, .onnx or .safetensors file, or an http(s):// endpoint.")
    ],
    data: Data,
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
    alpha: Annotated[float, typer.Option(help="The p-value at which the mark counts as found.")] = 1e-6,
    keys_tried: Annotated[
        int, typer.Option(help="Keys tried in this search; p is multiplied by it.", min=1)
    ] = 1,
    report: Annotated[Path | None, typer.Option(help="Write a report, .html or .pdf.")] = None,
    journal: Annotated[Path | None, typer.Option(help="Keep an endpoint's answers in this file.")] = None,
    batch_size: Annotated[int, typer.Option(help="Inputs in one request to an endpoint.", min=1)] = 64,
    timeout: Annotated[
        float, typer.Option(help="Seconds to wait for an endpoint's answer.", min=0.01)
    ] = 30.0,
    header: Annotated[list[str] | None, typer.Option(help="'NAME: VALUE' for an endpoint, or @FILE.")] = None,
    passphrase_file: Passphrase = None,
    seed: Seed = 0,
    as_json: Json = False,
) -> int:
    """Ask whether a suspect carries your mark. Exit code 0: yes; 1: no evidence; 3: inconclusive."""
    from gradmark.commands.summary import verified
    from gradmark.commands.verify import Endpoint, VerifyJob, parse_headers, run_verify

    job = VerifyJob(
        suspect, data, None if key is None else _key(key, passphrase_file), mark, linear_mark, model,
        access, queries, alpha, keys_tried, seed, report,  # type: ignore[arg-type]
        Endpoint(batch_size, timeout, journal, parse_headers(header or [])),
    )  # fmt: skip
    verdict = run_verify(job, _err())
    return _show(CODES[verdict.outcome], as_json, verdict.to_json(), *verified(verdict, suspect, report))


def _ask(what: str, twice: bool) -> str | None:
    """A passphrase from the terminal, or None where there is none."""
    if not sys.stdin.isatty():
        return None
    return str(typer.prompt(what, hide_input=True, confirmation_prompt=twice, err=True))


def _key(path: Path, passphrase_file: Path | None) -> OwnerKey:
    from gradmark.commands.keygen import open_key

    return open_key(path, passphrase_file, _ask)


def _settings(lines: list[str]) -> tuple[tuple[str, Any], ...]:
    """``NAME=VALUE`` with a JSON value each."""
    found = []
    for line in lines:
        name, _, value = line.partition("=")
        try:
            found.append((name, json.loads(value)))
        except ValueError as cause:
            raise UsageError(
                "--set makes no sense", expected="NAME=NUMBER, as step=0.1", found=line
            ) from cause
    return tuple(found)


def _continue(name: str, options: dict[str, Any]) -> str:
    """How an interrupted command is taken up again, if there is anything to take up."""
    if name == "embed" and (options["out"] / ".work").is_dir():
        return "; continue with --resume"
    if name == "verify" and options["suspect"].startswith(("http://", "https://")):
        return "; the same command goes on and asks nothing twice"
    return ""


def _err() -> Console:
    return Console(stderr=True)


def _show(code: int, as_json: bool, content: dict[str, Any], *shown: Any) -> int:
    if as_json:
        typer.echo(json.dumps(content, allow_nan=False, default=str))
    else:
        for item in shown:
            Console().print(item, highlight=False, markup=False, soft_wrap=isinstance(item, str))
    return code


def _fail(kind: str, message: str, options: dict[str, Any]) -> int:
    Console(stderr=True).print(
        f"gradmark: {message}", style="red", highlight=False, markup=False, soft_wrap=True
    )
    if options.get("as_json"):
        typer.echo(json.dumps({"error": message, "type": kind}))
    return FAILED


def main() -> None:
    """The ``gradmark`` command."""
    if not sys.warnoptions:
        warnings.simplefilter("ignore")  # torch and its exporters warn of what users can't change
    app()


if __name__ == "__main__":
    main()
