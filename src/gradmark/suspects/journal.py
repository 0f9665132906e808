"""An append-only record of answers, so that an interrupted run asks no endpoint anything twice.

One JSON object per line: ``{"input": "<hex sha256>", "scores": [...]}``, the hash taken over the
endpoint's address and the input's float32 bytes. A torn last line is dropped; any other damaged
line is an error.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import threading
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from gradmark.errors import DataError, OutputPathError


class Journal:
    """The answers in the file ``path`` (created with mode 0600) to inputs sent to ``address``."""

    def __init__(self, path: Path, address: str) -> None:
        """Read the file. Raises DataError where it is damaged, OutputPathError where it can't be used."""
        self.path = path
        self._address = address.encode()
        self._lock = threading.Lock()
        self._answers: dict[str, list[float]] = {}
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_CLOEXEC", 0), 0o600)
            with os.fdopen(descriptor, "r+b") as file:
                content = file.read()
                whole = self._read(content)
                if whole < len(content):
                    file.truncate(whole)
        except OSError as cause:
            fix = "Name a file in a folder that you can write to"
            raise OutputPathError(
                f"The journal {path.name} can't be used", found=str(cause.strerror), fix=fix
            ) from cause

    def __len__(self) -> int:
        return len(self._answers)

    def key(self, row: Tensor) -> str:
        """The hash of one input (*shape), float32."""
        shape = str(tuple(row.shape)).encode()
        content: bytes = row.detach().cpu().contiguous().numpy().astype(np.float32).tobytes()
        return self.hashed(self._address, shape, content)

    @staticmethod
    def hashed(*parts: bytes) -> str:
        """The hash under which something asked is noted: of ``parts`` with a zero byte between them."""
        return hashlib.sha256(b"\0".join(parts)).hexdigest()

    def get(self, key: str) -> list[float] | None:
        """The scores that the endpoint gave for this input, if it was asked."""
        return self._answers.get(key)

    def add(self, keys: list[str], scores: Tensor) -> None:
        """Note the answers (b, C) and have them on the disk before returning."""
        rows: list[list[float]] = scores.tolist()
        lines = [
            json.dumps({"input": key, "scores": row}) + "\n" for key, row in zip(keys, rows, strict=True)
        ]
        with self._lock:
            try:
                with self.path.open("ab") as file:
                    file.write("".join(lines).encode())
                    file.flush()
                    os.fsync(file.fileno())
            except OSError as cause:
                what = f"The journal {self.path.name} can't be written"
                raise OutputPathError(
                    what, found=str(cause.strerror), fix="Free some disk space, then resume"
                ) from cause
            self._answers.update(zip(keys, rows, strict=True))

    def _read(self, content: bytes) -> int:
        """Take over the lines; returns the number of bytes up to the last whole one."""
        whole = 0
        lines = content.splitlines(keepends=True)
        for number, line in enumerate(lines, 1):
            entry = _entry(line)
            if entry is None:
                if number == len(lines) and not line.endswith(b"\n") and _torn(line):
                    return whole  # torn by an interruption: that input will be asked again
                raise DataError(
                    f"The journal {self.path.name} is damaged in line {number}",
                    expected='{"input": hash, "scores": [numbers]}',
                    fix="Name another journal file; the answers in this one will be asked for again",
                )
            self._answers[entry[0]] = entry[1]
            whole += len(line)
        return whole


def _torn(line: bytes) -> bool:
    """Whether this may be the first part of a line of ours, and not somebody's one-line file."""
    start = b'{"input": "'
    return line[: len(start)] == start[: len(line)]


def _entry(line: bytes) -> tuple[str, list[float]] | None:
    try:
        entry: Any = json.loads(line)
        key, scores = entry["input"], [float(score) for score in entry["scores"]]
    except (ValueError, TypeError, KeyError, OverflowError, RecursionError):
        return None
    whole = line.endswith(b"\n") and isinstance(key, str) and all(map(math.isfinite, scores))
    return (key, scores) if whole else None
