"""Typed errors: each says what was expected, what was found and what to do about it."""

from __future__ import annotations

import re

# Control characters, and those that change the direction of what follows: a name could fake a text with them,
# or give orders to a terminal.
_HIDDEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff\ud800-\udfff"
    "\U000e0000-\U000e007f]"
)


def visible(text: str) -> str:
    """``text`` with its invisible characters made visible, as U+FFFD."""
    return _HIDDEN.sub("\ufffd", text)


class GradmarkError(Exception):
    """Base of every error gradmark raises on purpose; the command line exits with 2 on it.

    ``what`` is one sentence on what failed; ``expected`` and ``found`` complete it, and ``fix``
    tells the user what to do next. All are plain strings, :func:`visible`, and never hold a secret.
    """

    def __init__(self, what: str, *, expected: str = "", found: str = "", fix: str = "") -> None:
        what, expected, found, fix = map(visible, (what, expected, found, fix))
        self.what, self.expected, self.found, self.fix = what, expected, found, fix
        parts = [_ended(what)]
        if expected:
            parts.append(f"Expected {expected}.")
        if found:
            parts.append(f"Found {found}.")
        if fix:
            parts.append(_ended(fix))
        super().__init__(" ".join(parts))


def _ended(sentence: str) -> str:
    """With its full stop, unless it ends with a question mark."""
    return sentence if sentence.endswith("?") else sentence.rstrip(".") + "."


class KeyFileError(GradmarkError):
    """The key file is missing, truncated, tampered with, of another format, or already exists."""


class PassphraseError(KeyFileError):
    """The passphrase is missing or wrong."""


class MarkFileError(GradmarkError):
    """The mark file is missing, truncated, tampered with or of another format."""


class SealFileError(GradmarkError):
    """The seal is missing, truncated, tampered with or of another format."""


class ClaimError(GradmarkError):
    """The claim or opening is missing, truncated, of another format, or says what can't be."""


class TimestampError(GradmarkError):
    """A time stamp can't be had or read, or the certificates to check it with can't."""


class MismatchError(GradmarkError):
    """Key and mark don't belong together, or a mark doesn't fit the suspect or the data."""


class ModelFileError(GradmarkError):
    """The model file can't be read safely: a pickle, damaged, or of an unknown format."""


class ModelError(GradmarkError):
    """The model doesn't do what its use requires: wrong shapes, no gradient, NaN outputs."""


class DataError(GradmarkError):
    """The data can't be read or lacks what is needed."""


class EndpointError(GradmarkError):
    """The endpoint failed for good: refused, kept failing after retries, or answered nonsense."""


class QueryBudgetError(GradmarkError):
    """The query budget is spent."""


class OutputPathError(GradmarkError):
    """The output can't be written: it exists already, or the disk refuses."""


class PreflightError(GradmarkError):
    """No method gives a right penalty gradient on this model; says why and what to change."""


class ResumeError(GradmarkError):
    """A checkpoint can't be resumed: missing, damaged, or of another run."""


class UnknownNameError(GradmarkError):
    """No such scheme, attack or task; suggests the nearest name."""


class UsageError(GradmarkError):
    """An option or argument has a value that makes no sense."""


class AttackError(GradmarkError):
    """An attack can't be run: the thief lacks what it needs, or the model doesn't allow it."""
