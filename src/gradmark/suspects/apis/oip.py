"""The Open Inference Protocol, version 2 (KServe, Triton, MLServer, TorchServe), over HTTP.

The address is the model's: ``http://host:8000/v2/models/NAME`` or ``.../versions/N``. What it says of itself
tells the tensors' names, types and shapes. Where the server has the binary tensor extension, arrays
travel as bytes, else as JSON numbers.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import prod
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import numpy as np
from torch import Tensor

from gradmark.errors import EndpointError
from gradmark.suspects.apis import BadAnswer, Get
from gradmark.suspects.apis.plain import parsed
from gradmark.suspects.checks import MOST_AT_ONCE
from gradmark.suspects.transport import Answer

_TYPES = {"FP16": "<f2", "FP32": "<f4", "FP64": "<f8", "UINT8": "u1"}
_LENGTH = "inference-header-content-length"
_DIGITS = 12  # of the length of a header; more is none


@dataclass(frozen=True)
class OpenInference:
    """The input's ``name``, ``datatype`` and ``shape``, the output's name. UINT8 is [0, 1] in 255 steps."""

    name: str = ""
    datatype: str = "FP32"
    shape: tuple[int, ...] = ()
    output: str = ""
    binary: bool = False

    identity: str = "oip"

    @property
    def most(self) -> int | None:
        return self.shape[0] if self.shape and self.shape[0] > 0 else None

    def prepared(self, url: str, get: Get) -> OpenInference:
        """With what the server says of the model; EndpointError where that can't be asked for."""
        said = parsed(get(url).body, "the model's metadata")
        try:
            inputs, outputs = list(said["inputs"]), list(said["outputs"])
            first = inputs[0]
            shape = tuple(int(size) for size in first["shape"])
            score = next(out for out in outputs if out["datatype"] in ("FP16", "FP32", "FP64"))
            name, kind, output = str(first["name"]), str(first["datatype"]), str(score["name"])
        except (KeyError, TypeError, ValueError, IndexError, OverflowError, StopIteration) as cause:
            raise BadAnswer("gave no metadata of a classifier", "inputs and a floating output") from cause
        if len(inputs) != 1 or kind not in _TYPES:
            found = ", ".join(str(i)[:80] for i in inputs[:5])
            raise BadAnswer("takes inputs of another kind", f"one of {', '.join(_TYPES)}", found)
        if not shape or shape[0] > MOST_AT_ONCE:
            raise BadAnswer(
                "takes inputs of another shape", f"a batch of {MOST_AT_ONCE} at most", str(shape)[:80]
            )
        return replace(self, name=name, datatype=kind, shape=shape, output=output, binary=_binary(url, get))

    def request(self, url: str, x: Tensor) -> tuple[str, bytes, Mapping[str, str]]:
        array = self._shaped(x)
        tensor: dict[str, Any] = {"name": self.name, "shape": list(array.shape), "datatype": self.datatype}
        output: dict[str, Any] = {"name": self.output}
        headers: dict[str, str] = {}
        raw = b""
        if self.binary or self.datatype == "FP16":  # which JSON can't hold, says the protocol
            raw = array.tobytes()
            tensor["parameters"] = {"binary_data_size": len(raw)}
            output["parameters"] = {"binary_data": True}
        else:
            tensor["data"] = array.flatten().tolist()
        head = json.dumps({"inputs": [tensor], "outputs": [output]}).encode()
        if raw:
            headers = {_LENGTH: str(len(head)), "content-type": "application/octet-stream"}
        return _with(url, "/infer"), head + raw, headers

    def rows(self, answer: Answer, b: int) -> Any:
        length = answer.headers.get(_LENGTH, "")
        told = length.isascii() and length.isdigit() and len(length) < _DIGITS
        cut = int(length) if told else len(answer.body)
        said, raw = parsed(answer.body[:cut], "an inference response"), answer.body[cut:]
        try:
            tensor = next(out for out in said["outputs"] if out["name"] == self.output)
            shape = tuple(int(size) for size in tensor["shape"])
            if "data" in tensor:
                values = np.asarray(tensor["data"], dtype=np.float64)
            else:
                size = int(tensor["parameters"]["binary_data_size"])
                values = np.frombuffer(raw[:size], dtype=_TYPES[tensor["datatype"]]).astype(np.float64)
            if not shape:
                raise ValueError("a number alone")
            return values.reshape(shape)[:b]  # beyond b is what filled up a fixed batch
        except (KeyError, TypeError, ValueError, StopIteration, OverflowError) as cause:
            raise BadAnswer("gave no scores", f"an output {self.output!r} of the shape it states") from cause

    def _shaped(self, x: Tensor) -> np.ndarray[Any, Any]:
        wanted, own = self.shape[1:], tuple(x.shape[1:])
        fixed = all(size > 0 for size in wanted)
        if (fixed and prod(wanted) != prod(own)) or (not fixed and len(wanted) != len(own)):
            raise EndpointError(
                "The data doesn't fit the endpoint's model",
                expected=f"inputs of shape {wanted}",
                found=str(own),
            )
        array = x.numpy().reshape(len(x), *(wanted if fixed else own))
        most = self.most
        if most is not None and len(array) < most:
            array = np.concatenate([array, np.repeat(array[-1:], most - len(array), axis=0)])
        if self.datatype == "UINT8":
            array = np.rint(array * 255).clip(0, 255)
        return array.astype(_TYPES[self.datatype])


def _binary(url: str, get: Get) -> bool:
    """Whether the server has the binary tensor extension; one that says nothing of itself hasn't."""
    parts = urlsplit(url)
    root = urlunsplit((parts.scheme, parts.netloc, parts.path.partition("/v2/")[0] + "/v2", parts.query, ""))
    try:
        said = parsed(get(root).body, "the server's metadata")
    except (EndpointError, BadAnswer):
        return False
    extensions = said.get("extensions") if isinstance(said, dict) else None
    return isinstance(extensions, list) and "binary_tensor_data" in extensions


def _with(url: str, end: str) -> str:
    parts = urlsplit(url)
    return urlunsplit(parts._replace(path=parts.path.rstrip("/") + end))
