"""``gradmark keygen``: a new owner's key in a file of its own, and how every command opens one."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from gradmark._version import __version__
from gradmark.errors import KeyFileError, PassphraseError
from gradmark.keys import OwnerKey

T = TypeVar("T")
Ask = Callable[[str, bool], str | None]
"""Asks a person for a passphrase, twice if the second argument says so; None where nobody is there."""


@dataclass(frozen=True)
class NewKey:
    """What may be told about a key that was made. No secret."""

    path: str
    owner: str
    key_id: str
    protected: bool

    def to_json(self) -> dict[str, Any]:
        return {"key": self.path, "owner": self.owner, "key_id": self.key_id, "protected": self.protected,
                "version": __version__}  # fmt: skip


def make_key(owner: str, out: Path, passphrase: str | None, *, seed: int | None = None) -> NewKey:
    """Write a new key to ``out``, in the clear if ``passphrase`` is None.

    ``seed`` makes a throw-away key for tests: whoever guesses the number has it.
    Raises KeyFileError where ``out`` exists, OutputPathError where it can't be written.
    """
    key = OwnerKey.generate(owner) if seed is None else OwnerKey.from_seed(seed, owner)
    key.save(out, passphrase)
    return NewKey(str(out), key.owner, key.key_id, passphrase is not None)


def open_key(path: Path, passphrase_file: Path | None, ask: Ask) -> OwnerKey:
    """The key in ``path``; a passphrase is asked for only where one is needed and none was given."""
    return opened_with(OwnerKey.load, path, passphrase_file, ask)


def opened_with(
    load: Callable[[Path, str | None], T], path: Path, passphrase_file: Path | None, ask: Ask
) -> T:
    """What ``load`` makes of ``path`` and the passphrase, which is asked for only where one is needed."""
    given = _given(passphrase_file)
    try:
        return load(path, given)
    except PassphraseError as error:
        answer = ask(f"Passphrase of {path}", False) if given is None else None
        if answer is None:
            raise PassphraseError(
                f"{path.name}: {error.what}", expected=error.expected, found=error.found, fix=error.fix
            ) from error
    return load(path, answer)


def new_passphrase(out: Path, passphrase_file: Path | None, ask: Ask) -> str:
    """The passphrase for a key file to be written to ``out``; PassphraseError where none can be had."""
    if out.exists():  # before anybody types one
        found, fix = f"an existing file: {out}", "Choose another path"
        raise KeyFileError("A key file is never overwritten", expected="a new path", found=found, fix=fix)
    given = _given(passphrase_file)
    if given is None:
        given = ask("Passphrase for the new key", True)
    if given is None:
        fix = "Give --passphrase-file, set GRADMARK_PASSPHRASE, or say --no-passphrase"
        found = "none, and no terminal to ask on"
        raise PassphraseError("A new key needs a passphrase", found=found, fix=fix)
    return given


def _given(file: Path | None) -> str | None:
    """What the file (without its last line break) or the environment gives."""
    return os.environ.get("GRADMARK_PASSPHRASE") or None if file is None else read_passphrase(file)


def read_passphrase(file: Path) -> str:
    """The text of ``file`` without its last line break. PassphraseError where it can't be read."""
    try:
        return file.read_text().removesuffix("\n").removesuffix("\r")
    except (OSError, UnicodeDecodeError) as cause:
        raise PassphraseError("The passphrase file can't be read", found=str(file)) from cause
