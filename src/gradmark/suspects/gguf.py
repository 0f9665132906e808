"""Weights as ``.gguf``, plain or quantised, read by the maintained package (extra ``gradmark[gguf]``)."""

from __future__ import annotations

import os
import struct
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor

from gradmark.errors import ModelFileError
from gradmark.suspects.checks import brief

_START = struct.Struct("<4sIQQ")
_STRING, _ARRAY = 8, 9
_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
"""Bytes of the other kinds of value, as the format has them."""
_LEAST = 12  # bytes of a field or a tensor's entry
_DEPTH = 4


def read_gguf(path: Path) -> dict[str, Tensor]:
    """Every tensor by its name in the file; quantised ones as the float32 numbers that they stand for.

    Raises ModelFileError where the package is missing or the file isn't whole.
    """
    try:
        from gguf import GGUFReader, dequantize
    except ImportError as cause:
        fix = "pip install 'gradmark[gguf]'"
        raise ModelFileError(f"{path.name} needs the package gguf, which isn't installed", fix=fix) from cause
    found: dict[str, Tensor] = {}
    try:
        _measure(path)
        # the package warns of odd numbers before it raises, and has no exceptions of its own
        with np.errstate(all="ignore"):
            for tensor in GGUFReader(path).tensors:
                shape = [int(n) for n in reversed(tensor.shape.tolist())]
                values = np.ascontiguousarray(dequantize(tensor.data, tensor.tensor_type), dtype=np.float32)
                found[str(tensor.name)] = torch.from_numpy(values.copy()).reshape(shape)
    except Exception as cause:
        raise ModelFileError(
            f"{path.name} can't be read as GGUF",
            expected="a whole GGUF file of version 2 or 3, of numbers that can be written out",
            found=brief(cause),
            fix="Copy or download it again, or convert it to safetensors",
        ) from cause
    if not found:
        raise ModelFileError(f"{path.name} holds no tensors", expected="the weights of a model")
    return found


def _measure(path: Path) -> None:
    """Walk over the header: the package believes every count in it, and would go on for ever.

    ValueError where something is longer than what is left of the file.
    """
    with path.open("rb") as file:
        header = _Header(file, path.stat().st_size)
        tensors, fields = header.counts()
        for _ in range(fields):
            header.skip(header.number("Q"))
            header.value(header.number("I"))
        for _ in range(tensors):
            header.skip(header.number("Q"))
            header.skip(8 * header.number("I") + 12)  # sizes, type and place


class _Header:
    """Goes over a file's header and takes nothing of it but lengths."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self.file, self.size = file, size

    def counts(self) -> tuple[int, int]:
        """How many tensors and fields there are."""
        start = self.file.read(_START.size)
        magic, version, tensors, fields = _START.unpack(start)
        if magic == b"GGUF" and version >= 1 << 16:  # whose numbers the package would take for others
            raise ValueError("a file of a big-endian machine")
        if magic != b"GGUF" or version not in (2, 3) or max(tensors, fields) * _LEAST > self.size:
            raise ValueError(f"version {version}, {tensors} tensors and {fields} fields in {self.size} bytes")
        return int(tensors), int(fields)

    def number(self, kind: str) -> int:
        (found,) = struct.unpack("<" + kind, self.file.read(struct.calcsize(kind)))
        return int(found)

    def skip(self, length: int) -> None:
        left = self.size - self.file.tell()
        if length > left:
            raise ValueError(f"{length} bytes where {left} are left")
        self.file.seek(length, os.SEEK_CUR)

    def value(self, kind: int, depth: int = 0) -> None:
        if kind == _STRING:
            self.skip(self.number("Q"))
        elif kind == _ARRAY:
            self.array(self.number("I"), self.number("Q"), depth)
        else:
            self.skip(_SIZES[kind])

    def array(self, kind: int, n: int, depth: int) -> None:
        if depth > _DEPTH or n > self.size:
            raise ValueError(f"an array of {n}")
        if kind in _SIZES:
            self.skip(n * _SIZES[kind])
        else:
            for _ in range(n):
                self.value(kind, depth + 1)
