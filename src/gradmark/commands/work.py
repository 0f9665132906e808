"""The work folder of an embedding: what a resumed run finds of the interrupted one."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gradmark.codec import MarkFile, atomic_write
from gradmark.errors import OutputPathError, ResumeError


def difference(name: str, before: Any, now: Any) -> str:
    """What differs between two settings; of tables of them, only that."""
    if isinstance(before, dict) and isinstance(now, dict):
        keys = [key for key in {**before, **now} if before.get(key) != now.get(key)]
        return "; ".join(difference(f"{name}.{key}", before.get(key), now.get(key)) for key in keys)
    if isinstance(before, list) and isinstance(now, list) and len(before) == len(now):
        pairs = [(i, a, b) for i, (a, b) in enumerate(zip(before, now, strict=True)) if a != b]
        return "; ".join(difference(f"{name}.{i}", a, b) for i, a, b in pairs)
    return f"{name}: {str(before)[:60]} then, {str(now)[:60]} now"


class Work:
    """``OUT/.work``: the run's identity, its mark, finished stages and checkpoints. No secret."""

    def __init__(self, out: Path, identity: dict[str, Any]) -> None:
        self.out, self.folder = out, out / ".work"
        self._identity: dict[str, Any] = json.loads(json.dumps(identity))

    def open(self, *, resume: bool) -> None:
        """Make the folders, or check that what lies there is this very run."""
        if resume:
            self._check()
            return
        try:
            self.out.mkdir(parents=True)
            self.folder.mkdir()
        except OSError as cause:
            raise OutputPathError(
                "The output folder can't be made",
                found=f"{cause.strerror}: {self.out}",
                fix="Check the path and rights",
            ) from cause
        try:
            self.save("run", self._identity)
        except BaseException:
            shutil.rmtree(self.out, ignore_errors=True)
            raise

    def _check(self) -> None:
        if not self.folder.is_dir():
            done = (self.out / "run.json").exists()
            found = "a finished run" if done else "no unfinished run"
            raise ResumeError(
                "There is nothing to resume",
                found=f"{found} in {self.out}",
                fix="Start afresh, without --resume",
            )
        before = self.load("run")
        if before is None:
            raise ResumeError(
                "There is nothing to resume", found="an empty run", fix=f"Remove {self.out} and start afresh"
            )
        differ = [
            name for name in {**before, **self._identity} if before.get(name) != self._identity.get(name)
        ]
        if differ:
            shown = "; ".join(difference(name, before.get(name), self._identity.get(name)) for name in differ)
            raise ResumeError(
                "The run can't be resumed with another configuration",
                expected="the same command with --resume",
                found=shown[:600],
            )

    def checkpoint(self, stage: str) -> Path:
        return self.folder / f"{stage}.ckpt"

    def mark(self, create: Callable[[], MarkFile]) -> MarkFile:
        """The run's mark file: made once, so that a resumed run commits to the same one."""
        path = self.folder / "mark.json"
        if not path.exists():
            create().save(path)
        return MarkFile.load(path)

    def save(self, name: str, row: dict[str, Any]) -> None:
        atomic_write(self.folder / f"{name}.json", json.dumps(row).encode(), overwrite=True)

    def has(self, name: str) -> bool:
        return (self.folder / f"{name}.json").exists()

    def load(self, name: str) -> dict[str, Any] | None:
        """What :meth:`save` wrote, or None. ResumeError where it is damaged."""
        try:
            row = json.loads((self.folder / f"{name}.json").read_text())
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as cause:
            raise ResumeError(f"The work folder's {name}.json can't be read", fix="Start afresh") from cause
        if not isinstance(row, dict):
            raise ResumeError(f"The work folder's {name}.json can't be read", fix="Start afresh")
        return row

    def close(self) -> None:
        """Nothing is left to resume."""
        shutil.rmtree(self.folder, ignore_errors=True)
