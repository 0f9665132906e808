"""Weights as ``.gguf``, plain or quantised, read by the maintained package (extra ``gradmark[gguf]``)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from gradmark.errors import ModelFileError
from gradmark.suspects.checks import brief


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
