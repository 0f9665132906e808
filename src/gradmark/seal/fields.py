"""The parts of a seal file: tensors and arrays as JSON values, and back with every value checked."""

from __future__ import annotations

import base64
import binascii
import math
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gradmark.errors import SealFileError
from gradmark.protocols import ModelSpec
from gradmark.seal.manifest import ROWS, SAMPLE, WIDTH, TensorRecord
from gradmark.seal.probes import Probes

SHA = re.compile(r"sha256:[0-9a-f]{64}")
_LARGEST = 1e30
_RECORD = {"name", "dtype", "shape", "digest", "norm", "sketch", "sample"}
_PROBES = {"inputs", "scores", "anchors", "anchor_scores", "form", "tolerance", "sensitivity"}


def record_json(r: TensorRecord) -> dict[str, Any]:
    return {"name": r.name, "dtype": r.dtype, "shape": list(r.shape), "digest": r.digest, "norm": r.norm,
            "sketch": "" if r.sketch is None else encoded(r.sketch.astype("<f8").tobytes()),
            "sample": encoded(r.sample)}  # fmt: skip


def probes_json(p: Probes, spec: ModelSpec) -> dict[str, Any]:
    return {"inputs": encoded(_pack(p.x, spec)), "scores": encoded(_doubles(p.scores)),
            "anchors": encoded(_pack(p.anchors, spec)), "anchor_scores": encoded(_doubles(p.anchor_scores)),
            "form": p.form, "tolerance": p.tolerance, "sensitivity": p.sensitivity}  # fmt: skip


def records_from(value: object) -> tuple[TensorRecord, ...]:
    if not isinstance(value, list) or not value:
        raise absurd("tensors", type(value).__name__)
    found = []
    for row in value:
        only_fields(row, _RECORD, "a tensor")
        shape = row["shape"]
        if not isinstance(shape, list) or not all(type(n) is int and 0 <= n < 2**40 for n in shape):
            raise absurd("shape", shape)
        n = math.prod(shape)
        sketch = None
        if row["sketch"] != "":
            sums = np.frombuffer(decoded(row["sketch"], "sketch", 8 * ROWS * WIDTH), "<f8")
            if not np.isfinite(sums).all():
                raise absurd("sketch", "NaN or infinity")
            sketch = sums.reshape(ROWS, WIDTH).astype(np.float64)
        size = min(n, SAMPLE) if row["sample"] != "" else 0
        found.append(TensorRecord(
            text(row["name"], "name"), text(row["dtype"], "dtype"), tuple(shape),
            matching(row["digest"], SHA, "digest"), _number(row["norm"], "norm"),
            sketch, decoded(row["sample"], "sample", size),
        ))  # fmt: skip
    if len({r.name for r in found}) != len(found):
        raise absurd("tensors", "one name twice")
    return tuple(found)


def probes_from(value: object, spec: ModelSpec) -> Probes:
    body = only_fields(value, _PROBES, "the probes")
    if body["form"] not in ("logits", "probabilities"):
        raise absurd("form", body["form"])
    if any(bound is not None and abs(bound) > _LARGEST for bound in (spec.low, spec.high)):
        raise absurd("input range", (spec.low, spec.high))  # a float32 couldn't hold it
    sensitivity = body["sensitivity"]
    if not isinstance(sensitivity, dict):
        raise absurd("sensitivity", type(sensitivity).__name__)
    x, scores = _unpack(body["inputs"], spec), scores_from(body["scores"], spec, body["form"])
    anchors, others = _unpack(body["anchors"], spec), scores_from(body["anchor_scores"], spec, body["form"])
    if len(x) != len(scores) or len(anchors) != len(others):
        raise absurd("scores", f"{len(scores)} and {len(others)} rows for {len(x)} and {len(anchors)} inputs")
    return Probes(
        x, scores, anchors, others, body["form"], _number(body["tolerance"], "tolerance"),
        {text(name, "name"): _number(v, "sensitivity") for name, v in sensitivity.items()},
    )  # fmt: skip


def _pack(x: Tensor, spec: ModelSpec) -> bytes:
    """Inputs as steps of the input format, one or two bytes each, else as float32; little-endian."""
    kind = _kind(spec)
    if kind == "<f4":
        return x.to(torch.float32).contiguous().numpy().astype(kind).tobytes()
    unit = (_given(spec.high) - _given(spec.low)) / _given(spec.levels)
    steps = ((x.double() - _given(spec.low)) / unit).round()
    return steps.contiguous().numpy().astype(kind).tobytes()


def _unpack(value: object, spec: ModelSpec) -> Tensor:
    kind, one = _kind(spec), math.prod(spec.input_shape)
    raw = decoded(value, "inputs", None)
    if not raw or len(raw) % (one * np.dtype(kind).itemsize):
        raise absurd("inputs", f"{len(raw)} bytes for inputs of shape {spec.input_shape}")
    numbers = torch.from_numpy(np.frombuffer(raw, kind).astype(np.float32)).reshape(-1, *spec.input_shape)
    if kind != "<f4":
        low, high, levels = _given(spec.low), _given(spec.high), _given(spec.levels)
        if bool((numbers > levels).any()):
            raise absurd("inputs", "a step beyond the input format")
        x = spec.snap(numbers * ((high - low) / levels) + low)
        if not bool(torch.isfinite(x).all()):
            raise absurd("input range", (low, high))  # too narrow for a float32
        return x
    outside = [spec.low is not None and bool((numbers < spec.low - 1e-6).any()),
               spec.high is not None and bool((numbers > spec.high + 1e-6).any())]  # fmt: skip
    if not bool((numbers.abs() < _LARGEST).all()) or any(outside):
        raise absurd("inputs", "a value outside of the input's range")
    return numbers


def scores_from(value: object, spec: ModelSpec, form: str) -> Tensor:
    raw = decoded(value, "scores", None)
    if not raw or len(raw) % (8 * spec.n_classes):
        raise absurd("scores", f"{len(raw)} bytes for {spec.n_classes} classes")
    scores = torch.from_numpy(np.frombuffer(raw, "<f8").astype(np.float64)).reshape(-1, spec.n_classes)
    low = 0.0 if form == "probabilities" else -_LARGEST
    if not bool(((scores >= low) & (scores <= _LARGEST)).all()):
        raise absurd("scores", "NaN, infinity or no probabilities")
    return scores


def _kind(spec: ModelSpec) -> str:
    if spec.levels is None or spec.low is None or spec.high is None or spec.levels > 65535:
        return "<f4"
    return "<u1" if spec.levels <= 255 else "<u2"


def _given(value: float | None) -> float:
    return 0.0 if value is None else value


def _doubles(scores: Tensor) -> bytes:
    return scores.double().contiguous().numpy().astype("<f8").tobytes()


def encoded(data: bytes) -> str:
    return base64.b64encode(data).decode()


def decoded(value: object, name: str, size: int | None) -> bytes:
    try:
        raw = base64.b64decode(value, validate=True) if isinstance(value, str) else None
    except (binascii.Error, ValueError):
        raw = None
    if raw is None or (size is not None and len(raw) != size) or encoded(raw) != value:
        raise absurd(name, "no base64" if raw is None else f"{len(raw)} bytes")
    return raw


def only_fields(value: object, expected: set[str], what: str) -> dict[str, Any]:
    if not isinstance(value, dict) or set(value) != expected:
        found = ", ".join(sorted(value))[:200] if isinstance(value, dict) else type(value).__name__
        raise SealFileError(
            f"{what.capitalize()} has other fields than it should", expected=", ".join(sorted(expected)),
            found=found or "none", fix="Take the seal that gradmark wrote",
        )  # fmt: skip
    return value


def _checked(value: object, good: Callable[[Any], bool], name: str) -> Any:
    if not good(value):
        raise absurd(name, value)
    return value


def text(value: object, name: str) -> str:
    return str(_checked(value, lambda v: isinstance(v, str) and len(v) <= 1000, name))


def matching(value: object, pattern: re.Pattern[str], name: str) -> str:
    return str(_checked(value, lambda v: isinstance(v, str) and bool(pattern.fullmatch(v)), name))


def _number(value: object, name: str) -> float:
    return float(_checked(value, lambda v: type(v) in (int, float) and 0 <= v <= _LARGEST, name))


def absurd(name: str, found: object) -> SealFileError:
    return SealFileError(
        f"The seal's {name} makes no sense", expected="a value as gradmark writes it",
        found=repr(found)[:80], fix="Take the seal that gradmark wrote",
    )  # fmt: skip


__all__ = [
    "SHA",
    "absurd",
    "decoded",
    "encoded",
    "matching",
    "only_fields",
    "probes_from",
    "probes_json",
    "record_json",
    "records_from",
    "text",
]
