"""What every command of the command line shares: the application, common options, errors, output.

Exit codes: 0 mark found, 1 no evidence, 3 inconclusive, 2 it could not be done. Heavy imports wait
until a command needs them, so that ``--help`` is quick.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from gradmark._version import __version__
from gradmark.errors import GradmarkError, OutputPathError, UsageError, visible

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
_DATA = typer.Option("--data", help="digits, an .npz, a datasets folder or MODULE:FACTORY.")
Data = Annotated[str, _DATA]
SomeData = Annotated[str | None, _DATA]
Task = Annotated[
    str | None,
    typer.Option("--task", help="tabular, faces, ... or MODULE:FACTORY, with data, network and scores."),
]
Device = Annotated[str, typer.Option(help="Where to compute: cpu, cuda, cuda:1 or mps.")]
OpeningsPassphrase = Annotated[
    Path | None,
    typer.Option(
        "--passphrase-file",
        help="File with the passphrase that the owner told you; else GRADMARK_PASSPHRASE, else asked for.",
    ),
]
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
                kept = _kept(run.__name__, options) if isinstance(error, OutputPathError) else ""
                code = _fail(type(error).__name__, str(error) + kept, options)
            except typer.Exit:
                raise
            except typer.Abort:  # at a prompt; click would exit with 1, which is a verdict here
                code = _fail("Interrupted", "interrupted at the prompt", options)
            except Exception as error:  # a bug, or a full disk: it must not look like "no evidence"
                if os.environ.get("GRADMARK_TRACEBACK"):
                    traceback.print_exc()
                first = (str(error).strip().splitlines() or [""])[0]
                hint = "GRADMARK_TRACEBACK=1 shows where."
                said = f"unexpected {type(error).__name__}: {first} ({hint}){_kept(run.__name__, options)}"
                code = _fail(type(error).__name__, said, options)
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


def ask(what: str, twice: bool) -> str | None:
    """A passphrase from the terminal, or None where there is none."""
    if not sys.stdin.isatty():
        return None
    return str(typer.prompt(what, hide_input=True, confirmation_prompt=twice, err=True))


def key_of(path: Path, passphrase_file: Path | None) -> OwnerKey:
    from gradmark.commands.keygen import open_key

    return open_key(path, passphrase_file, ask)


def task_or(task: str | None, given: str | None, option: str) -> str:
    """What ``option`` names, or nothing where a task says it. UsageError where both do or neither."""
    if (task is None) == (given is None):
        raise UsageError(f"Give {option} or --task, one of them", found="both" if given else "neither")
    return given or ""


def settings(lines: list[str]) -> tuple[tuple[str, Any], ...]:
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
        from gradmark.files import private_folder

        kept = options.get("journal") or private_folder()
        return "; the same command goes on and asks nothing twice" if kept else ""
    return ""


def _kept(name: str, options: dict[str, Any]) -> str:
    """What is left of hours of training after a failure."""
    kept = name == "embed" and (options["out"] / ".work" / "control.json").is_file()
    return " What was trained is kept: the same command with --resume goes on." if kept else ""


def err() -> Console:
    return Console(stderr=True)


class _Out(Console):
    """Standard output. Rich itself would end with 1, which is a verdict here, where nobody reads on."""

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError("nobody reads it")


def show(code: int, as_json: bool, content: dict[str, Any], *shown: Any) -> int:
    """``code``, or that of a failure where nobody could be told."""
    try:
        if as_json:
            typer.echo(json.dumps(content, allow_nan=False, default=str))
        else:
            for item in shown:
                _Out().print(_plain(item), highlight=False, markup=False, soft_wrap=isinstance(item, str))
        _flush()
        return code
    except OSError as error:
        _give_up_stdout()
        return _fail(type(error).__name__, f"the result can't be written to standard output: {error}", {})


def _fail(kind: str, message: str, options: dict[str, Any]) -> int:
    message = visible(message)
    with contextlib.suppress(OSError):  # whom nobody hears still fails with the right code
        err().print(f"gradmark: {message}", style="red", highlight=False, markup=False, soft_wrap=True)
    try:
        if options.get("as_json"):
            typer.echo(json.dumps({"error": message, "type": kind}))
        _flush()
    except OSError:
        _give_up_stdout()
    return FAILED


def _plain(item: Any) -> Any:
    """``item`` without orders to the terminal, which names of tensors and servers may hold."""
    if isinstance(item, Table):
        for column in item.columns:
            column._cells = [visible(c) if isinstance(c, str) else c for c in column._cells]
    return visible(item) if isinstance(item, str) else item


def _flush() -> None:
    if sys.stdout is not None:  # as it is where it was closed from the start: the exit code tells all
        sys.stdout.flush()


def _give_up_stdout() -> None:
    """What is left in its buffer would fail again when Python ends, with another exit code."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
