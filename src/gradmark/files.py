"""Bytes in and out: canonical JSON, wary reading, whole-or-nothing writing."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import secrets
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from gradmark.errors import GradmarkError, OutputPathError, UsageError

_NO_LINK = {errno.EPERM, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EMLINK}


def sha256(data: bytes) -> str:
    """``sha256:`` + the hex digest of ``data``: how gradmark names bytes everywhere."""
    return "sha256:" + hashlib.sha256(data).hexdigest()


def private_folder() -> Path | None:
    """Where what an interrupted run is to go on with is kept: this user's own, and nobody else's.

    ``XDG_STATE_HOME`` (an absolute path) or ``~/.local/state``, ``/gradmark``; None where that can't be
    written, or where others could write too.
    """
    given = Path(os.environ.get("XDG_STATE_HOME", ""))
    try:
        folder = (given if given.is_absolute() else Path("~/.local/state").expanduser()) / "gradmark"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        about = folder.lstat()
    except (OSError, RuntimeError):  # the latter where there is no home
        return None
    ours = not hasattr(os, "getuid") or (about.st_uid == os.getuid() and not about.st_mode & 0o022)
    return folder if ours and folder.is_dir() and os.access(folder, os.W_OK) else None


def canonical_json(obj: Any) -> bytes:
    """The one byte string that stands for ``obj``: sorted keys, no spaces, ASCII.

    Raises UsageError on NaN, infinities, keys that aren't text and values that JSON can't hold.
    """
    try:
        _check_keys(obj)
        return json.dumps(obj, sort_keys=True, separators=(",", ":"), allow_nan=False).encode("ascii")
    except (TypeError, ValueError, RecursionError) as e:
        raise UsageError(
            "The value can't be written as JSON",
            expected="finite numbers, text, booleans, null, lists, and dictionaries with text keys",
            found=str(e),
            fix="Convert the value to plain Python types",
        ) from None


def _check_keys(obj: Any) -> None:
    """``json`` would turn the key 1 into "1" in silence, and two keys could become one."""
    if isinstance(obj, dict):
        for key, value in obj.items():
            if not isinstance(key, str):
                raise TypeError(f"a key of type {type(key).__name__}")
            _check_keys(value)
    elif isinstance(obj, list | tuple):
        for value in obj:
            _check_keys(value)


def parse_object(data: bytes, *, what: str, error: type[GradmarkError], limit: int) -> dict[str, Any]:
    """The JSON object in hostile ``data``; raises ``error`` on anything else, also on doubled keys."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            raise ValueError("the same field twice")
        return found

    def constant(name: str) -> Any:
        raise ValueError(f"the number {name}")

    if len(data) > limit:
        raise error(f"The {what} is too big", expected=f"at most {limit} bytes", found=f"{len(data)} or more")
    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=unique, parse_constant=constant)
    except (ValueError, RecursionError) as e:
        # The exception's text may quote the file, which may be an unprotected key: only its kind is told.
        raise error(
            f"The {what} can't be read",
            expected="one complete JSON object in UTF-8",
            found=f"{len(data)} bytes that are cut short, damaged or of another kind ({type(e).__name__})",
            fix="Take an undamaged copy",
        ) from None
    if not isinstance(value, dict):
        raise error(f"The {what} can't be read", expected="a JSON object", found=type(value).__name__)
    return value


def read_limited(path: str | os.PathLike[str], *, what: str, error: type[GradmarkError], limit: int) -> bytes:
    """The bytes of ``path``, at most ``limit`` + 1 of them; raises ``error`` if it can't be read."""
    try:
        with Path(path).open("rb") as file:
            return file.read(limit + 1)
    except (OSError, ValueError) as e:
        reason = e.strerror if isinstance(e, OSError) else str(e)
        raise error(
            f"The {what} can't be opened",
            expected=f"a {what}",
            found=f"{reason}: {path}",
            fix="Check the path",
        ) from e


def read_arrays(path: str | os.PathLike[str], *, what: str, error: type[GradmarkError]) -> dict[str, Any]:
    """The arrays of an ``.npz``; nothing is unpickled. Raises ``error`` on anything else."""
    try:
        with Path(path).open("rb") as file:  # numpy leaves a file open that it can't read
            found = np.load(file, allow_pickle=False)
            if not isinstance(found, np.lib.npyio.NpzFile):
                raise ValueError("a single array")
            with found:
                return {name: found[name] for name in found.files}
    except (
        OSError,
        ValueError,
        EOFError,
        KeyError,
        MemoryError,
        RuntimeError,
        zipfile.BadZipFile,
        zlib.error,
    ) as e:
        raise error(
            f"The {what} can't be read",
            expected="an .npz of plain arrays",
            found=(str(e).splitlines() or [type(e).__name__])[0][:200],
            fix="Save the arrays with numpy.savez",
        ) from e


def atomic_write(
    path: str | os.PathLike[str], data: bytes, *, mode: int = 0o644, overwrite: bool = False
) -> None:
    """Write ``data`` to ``path`` as a whole or not at all, and have the disk confirm it.

    ``mode`` is cut by the umask. Without ``overwrite`` an existing file stays untouched even when two
    programs race. Raises OutputPathError; its ``__cause__`` is the OSError.
    """
    path = Path(path)
    temp = path.parent / f".gradmark-{secrets.token_hex(8)}.tmp"
    try:
        try:
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
            with os.fdopen(os.open(temp, flags, mode), "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            if overwrite:
                temp.replace(path)
            else:
                _place_new(temp, path)
        finally:
            with contextlib.suppress(OSError, ValueError):
                temp.unlink(missing_ok=True)
    except (OSError, ValueError) as e:
        exists = isinstance(e, FileExistsError)
        reason = e.strerror if isinstance(e, OSError) else str(e)
        raise OutputPathError(
            "The output can't be written",
            expected="a new path" if exists else "a path in a folder that can be written to",
            found=f"{reason}: {path}",
            fix="Choose another path, or remove the file"
            if exists
            else "Check the path, rights and free space",
        ) from e
    _sync_folder(path.parent)


def _place_new(temp: Path, path: Path) -> None:
    """Give ``temp`` the name ``path``; FileExistsError if that is taken."""
    try:
        os.link(temp, path)
    except OSError as e:
        if e.errno not in _NO_LINK:
            raise
        # No hard links here (FAT, some network disks): reserve the name, then replace the reservation.
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
        try:
            temp.replace(path)
        except OSError:
            path.unlink(missing_ok=True)
            raise


def _sync_folder(folder: Path) -> None:
    """Make the new name last through a power cut, where the system can."""
    with contextlib.suppress(OSError):  # Windows can't open folders; the file's own bytes are safe already
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
