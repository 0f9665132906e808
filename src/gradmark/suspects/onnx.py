"""An ONNX file as a suspect, on onnxruntime's CPU provider (extra ``gradmark[onnx]``)."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gradmark.errors import ModelError, ModelFileError
from gradmark.suspects.checks import MOST_AT_ONCE, brief, check_inputs, check_scores

_DTYPES = {
    "tensor(float)": np.float32,
    "tensor(double)": np.float64,
    "tensor(float16)": np.float16,
    "tensor(uint8)": np.uint8,
    "tensor(int32)": np.int32,
    "tensor(int64)": np.int64,
}


class OnnxSuspect:
    """Black-box access to an ONNX model: its first input, its first floating output of rank 2.

    A model with a fixed batch size is asked in padded batches of that size.
    """

    def __init__(self, path: str | Path, *, batch_size: int = 256) -> None:
        """Open the file. Raises ModelFileError where onnxruntime is missing or can't read it."""
        path = Path(path)
        self.name = path.name
        self._session = _open(path)
        self.digest = _digest(path)
        self._n_classes: int | None = None
        entry = self._session.get_inputs()[0]
        if entry.type not in _DTYPES:
            found = f"{entry.name!r} of type {entry.type}"
            raise ModelFileError(
                f"{path.name} takes no array of numbers", expected="a tensor input", found=found
            )
        self._input, self._dtype = entry.name, _DTYPES[entry.type]
        first = entry.shape[0] if entry.shape else None
        self._fixed = first if isinstance(first, int) and first > 0 else None
        if self._fixed is not None and self._fixed > MOST_AT_ONCE:
            raise ModelFileError(
                f"{path.name} takes nothing but huge batches", expected=f"{MOST_AT_ONCE} inputs at most",
                found=str(self._fixed), fix="Export it with a free batch axis",
            )  # fmt: skip
        self.batch_size = self._fixed or batch_size
        self._output = _score_output(self._session.get_outputs(), path.name)

    def __repr__(self) -> str:
        return f"OnnxSuspect({self.name!r})"

    def query(self, x: Tensor) -> Tensor:
        """Scores (b, C), float32 on the CPU. Raises ModelError where the run fails."""
        x = check_inputs(x, self.name).cpu()
        return torch.cat([self._ask(part) for part in torch.split(x, self.batch_size)])

    def _ask(self, x: Tensor) -> Tensor:
        b = x.shape[0]
        array = x.to(torch.float32).numpy() if x.dtype == torch.bfloat16 else x.numpy()
        if self._fixed is not None and b < self._fixed:
            array = np.concatenate([array, np.repeat(array[-1:], self._fixed - b, axis=0)])
        if self._dtype is np.uint8 and array.dtype.kind == "f":  # [0, 1] in 255 steps, as the OIP has it
            array = np.rint(array * 255).clip(0, 255)
        try:
            (out,) = self._session.run([self._output], {self._input: array.astype(self._dtype)})
        except Exception as cause:  # onnxruntime's exception classes share no public base
            what = f"{self.name} fails on inputs of shape {tuple(x.shape)}"
            raise ModelError(what, found=brief(cause), fix="Check that the data fits the model") from cause
        whole = len(array) == len(out) if isinstance(out, np.ndarray) and out.ndim else False
        scores = check_scores(out[:b] if whole else out, b, self._n_classes, self.name)
        self._n_classes = scores.shape[1]
        return scores


def _open(path: Path) -> Any:
    try:
        import onnxruntime
    except ImportError as cause:
        fix = "pip install gradmark[onnx]"
        raise ModelFileError(f"{path.name} needs onnxruntime, which isn't installed", fix=fix) from cause
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = torch.get_num_threads()
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        if not session.get_inputs():
            raise ValueError("the model has no input")
        return session
    except Exception as cause:  # as above: no public base class
        raise ModelFileError(
            f"{path.name} can't be read as an ONNX model",
            expected="an ONNX file whose operators onnxruntime knows",
            found=brief(cause),
            fix="Export it again, with its external data beside it",
        ) from cause


def _score_output(outputs: list[Any], name: str) -> str:
    floats = [out for out in outputs if out.type in ("tensor(float)", "tensor(double)", "tensor(float16)")]
    if not floats:
        found = ", ".join(f"{out.name}: {out.type}" for out in outputs[:5])
        raise ModelFileError(
            f"{name} gives no class scores", expected="a floating output (b, C)", found=found
        )
    matrices = [out for out in floats if len(out.shape or []) == 2]
    return str((matrices or floats)[0].name)


def _digest(path: Path) -> str:
    """Over the file, and over every file beside it that holds some of its weights, by name."""
    content = path.read_bytes()
    total = hashlib.sha256(content)
    for name in sorted(_elsewhere(content, path.name)):
        if name != path.name + ".data":  # where exporters put them: those digests stay what they were
            total.update(len(name.encode()).to_bytes(4, "big") + name.encode())
        with path.with_name(name).open("rb") as file:
            while chunk := file.read(1 << 20):
                total.update(chunk)
    return "sha256:" + total.hexdigest()


def _elsewhere(content: bytes, name: str) -> set[str]:
    """The other files that a model's tensors lie in. ModelFileError where one isn't beside it."""
    if b"location" not in content:
        return set()
    try:
        import onnx
    except ImportError as cause:
        raise ModelFileError(
            f"{name} may have weights in other files, which onnx tells", fix="pip install gradmark[onnx]"
        ) from cause
    found = {str(entry.value) for tensor in _tensors(onnx.load_from_string(content))
             for entry in tensor.external_data if entry.key == "location"}  # fmt: skip
    for other in found:
        if not (Path(name).parent / other).name == other or other in (".", ".."):
            raise ModelFileError(f"{name} has weights in another folder", found=other[:80])
    return found


def _tensors(message: Any) -> Iterator[Any]:
    """Every tensor with ``external_data`` anywhere in a protobuf message."""
    if message.DESCRIPTOR.name == "TensorProto":
        yield message
        return
    for kind, value in message.ListFields():
        if kind.message_type is not None:
            for part in value if hasattr(value, "__len__") else [value]:
                yield from _tensors(part)
