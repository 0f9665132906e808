"""Running the command line inside the tests' own process."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from typer.testing import CliRunner

from gradmark.cli import app


@dataclass(frozen=True)
class Outcome:
    code: int
    out: str
    err: str

    def json(self) -> dict[str, Any]:
        """The one object on standard output; fails where there is anything else."""
        found = json.loads(self.out)
        assert isinstance(found, dict)
        return found


def gradmark(*arguments: object, env: dict[str, str | None] | None = None) -> Outcome:
    result = CliRunner().invoke(
        app, [str(a) for a in arguments], env={"GRADMARK_PASSPHRASE": None, **(env or {})}
    )
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return Outcome(result.exit_code, result.stdout, result.stderr)


def refused(result: Outcome, *words: str) -> None:
    """Exit code 2 and one clear message without a traceback, on standard error alone."""
    assert result.code == 2, result.out + result.err
    assert "Traceback" not in result.err
    assert "GRADMARK_TRACEBACK" not in result.err, result.err
    assert not result.out or set(result.json()) == {"error", "type"}
    for word in words:
        assert word in result.err, result.err
