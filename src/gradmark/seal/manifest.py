"""The white-box half of a seal: what every tensor was, in a digest and in short summaries.

The digest decides whether a tensor is the sealed one. The summaries only tell how far off another one is,
and of small tensors they tell everything, so that a seal for the public has fewer:
a count sketch (Charikar, Chen and Farach-Colton 2002) of five rows of 32 signed sums, which is linear, so
that the difference of two is the sketch of the difference; and one byte of a hash for each of 1,024
entries drawn by the seal's seed, to count how many have another value.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gradmark.files import canonical_json

ROWS, WIDTH, SAMPLE = 5, 32, 1024
_LARGE = 8 * ROWS * WIDTH  # entries, from which on the sums are few beside them
_CHUNK = 1 << 20
_FEW = 28  # occupied sums of a row, beyond which they are too many to count changed entries by
_COUNTER = "num_batches_tracked"
_GOLDEN, _M1, _M2 = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


@dataclass(frozen=True)
class TensorRecord:
    """One sealed tensor: ``sketch`` (5, 32) float64, ``sample`` up to 1,024 bytes, ``norm`` its L2 norm.

    Without a sketch (None) there is no norm either (0).
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    digest: str
    norm: float
    sketch: NDArray[np.float64] | None
    sample: bytes


@dataclass(frozen=True)
class TensorChange:
    """How a suspect's tensor differs. ``kind``: changed, dtype, shape, missing or extra.

    Estimates, None where there is nothing to compare: ``relative_l2`` is ||change|| / ||sealed tensor|| (5 %
    standard error), ``max_abs`` the largest change of one entry (right for few; as if normal for many),
    ``changed`` the number of entries with another value, of ``entries``.
    """

    name: str
    kind: str
    entries: int
    relative_l2: float | None = None
    max_abs: float | None = None
    changed: int | None = None
    found: str = ""


def plain_tensors(tensors: Mapping[str, object]) -> dict[str, Tensor]:
    """What a manifest covers: every tensor of a state dict but batch norm's counters, without wrappers.

    Quantised tensors count with the values that they stand for. A prefix common to all names, as data-
    parallel and compiled modules have it (``module.``, ``_orig_mod.``), is left out.
    """
    found = {}
    for name, value in tensors.items():
        if isinstance(value, Tensor) and not (name.endswith(_COUNTER) and value.ndim == 0):
            wrapped = value.is_quantized or hasattr(value, "__tensor_flatten__")
            found[name] = (value.dequantize() if wrapped else value).detach().cpu()
    for prefix in ("module.", "_orig_mod."):
        if found and all(name.startswith(prefix) for name in found):
            found = {name.removeprefix(prefix): value for name, value in found.items()}
    return found


def record(name: str, value: Tensor, seed: int, *, public: bool = False) -> TensorRecord:
    """The record of one tensor under the seal's ``seed`` (64 bits).

    160 sums are as many equations, whose signs anybody can compute: they give small tensors away, and a byte
    of hash tells one of few values. So what may be published has sketches of large tensors, and no samples.
    """
    numbers = _numbers(value)
    told = not public or len(numbers) >= _LARGE
    norm, sketch = (float(np.linalg.norm(_finite(numbers))), _sketch(numbers, seed)) if told else (0.0, None)
    sample = b"" if public else _sample(numbers, seed)
    return TensorRecord(name, _dtype(value), tuple(value.shape), tensor_digest(value), norm, sketch, sample)


def tensor_digest(value: Tensor) -> str:
    """``sha256:`` over the length-prefixed dtype, shape and little-endian bytes in C order."""
    raw = value.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
    total = hashlib.sha256(b"gradmark/v1/tensor")
    for part in (_dtype(value).encode(), canonical_json(list(value.shape))):
        total.update(len(part).to_bytes(4, "big") + part)
    total.update(raw.data)
    return "sha256:" + total.hexdigest()


def compare(
    records: Mapping[str, TensorRecord], suspect: Mapping[str, Tensor], seed: int
) -> list[TensorChange]:
    """What differs between the sealed tensors and a suspect's, the strongest change first."""
    changes = []
    unchanged = {r.digest for r in records.values() if r.name in suspect
                 and tensor_digest(suspect[r.name]) == r.digest}  # fmt: skip
    for name, sealed in records.items():
        if name not in suspect:
            if sealed.digest not in unchanged:  # a tied tensor may be stored under one of its names
                changes.append(TensorChange(name, "missing", math.prod(sealed.shape)))
        elif (change := _change(sealed, suspect[name], seed)) is not None:
            changes.append(change)
    known = {r.digest for r in records.values()}
    for name in suspect:
        if name not in records and tensor_digest(suspect[name]) not in known:
            changes.append(TensorChange(name, "extra", suspect[name].numel()))
    return sorted(changes, key=lambda c: -(c.relative_l2 if c.relative_l2 is not None else math.inf))


def _change(sealed: TensorRecord, value: Tensor, seed: int) -> TensorChange | None:
    n, name = math.prod(sealed.shape), sealed.name
    if tuple(value.shape) != sealed.shape:
        return TensorChange(name, "shape", n, found=f"{tuple(value.shape)} instead of {sealed.shape}")
    if tensor_digest(value) == sealed.digest:
        return None
    kind = "changed" if _dtype(value) == sealed.dtype else "dtype"
    found = f"{_dtype(value)} instead of {sealed.dtype}" if kind == "dtype" else ""
    if sealed.sketch is None:
        return TensorChange(name, kind, n, found=found)
    numbers = _numbers(value)
    moved = _sketch(numbers, seed) - sealed.sketch
    changed = _count(moved, sealed, _sample(numbers, seed) if sealed.sample else b"", n)
    size = math.sqrt(float(np.square(moved).sum()) / ROWS)
    largest = float(np.abs(moved).max(1).min())  # where few entries moved, one sum holds the largest alone
    many = n if changed is None else changed
    if many > WIDTH // 4:
        largest = size / math.sqrt(many) * max(1.0, math.sqrt(2 * math.log(many)))
    return TensorChange(name, kind, n, size / max(sealed.norm, 1e-300), min(largest, size), changed, found)


def _count(moved: NDArray[np.float64], sealed: TensorRecord, sample: bytes, n: int) -> int | None:
    """How many entries have another value: by the sample, or by occupied sums where they are few.

    None where they are many and there is no sample.
    """
    before, now = (np.frombuffer(b, np.uint8) for b in (sealed.sample, sample))
    share = float((before != now).mean()) * 256 / 255 if len(now) else 0.0
    if len(now) and n <= SAMPLE:
        return min(n, round(n * share))
    occupied = (np.abs(moved) > 1e-11 * max(sealed.norm, 1e-300)).sum(1)
    if int(occupied.max()) <= _FEW:
        return round(float((-WIDTH * np.log1p(-occupied / WIDTH)).mean()))
    return min(n, round(n * share)) if len(now) else None


def _numbers(value: Tensor) -> NDArray[np.float64]:
    found: NDArray[np.float64] = value.detach().to(torch.float64).reshape(-1).numpy()
    return found


def _finite(numbers: NDArray[np.float64]) -> NDArray[np.float64]:
    found: NDArray[np.float64] = np.nan_to_num(numbers, nan=0.0, posinf=0.0, neginf=0.0)
    return found


def _dtype(value: Tensor) -> str:
    return str(value.dtype).removeprefix("torch.")


def _mixed(words: NDArray[np.uint64], salt: int) -> NDArray[np.uint64]:
    """splitmix64's output function of ``words`` + ``salt`` times its increment, modulo 2**64."""
    with np.errstate(over="ignore"):
        z = words + np.uint64(salt * _GOLDEN % 2**64)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(_M1)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(_M2)
        return z ^ (z >> np.uint64(31))


def _sketch(numbers: NDArray[np.float64], seed: int) -> NDArray[np.float64]:
    """Rows of signed sums (5, 32): entry i goes into one sum of each row, with one sign."""
    sums = np.zeros((ROWS, WIDTH))
    finite = _finite(numbers)
    for start in range(0, len(finite), _CHUNK):
        part = finite[start : start + _CHUNK]
        index = _mixed(np.arange(start, start + len(part), dtype=np.uint64) ^ np.uint64(seed), 1)
        for row in range(ROWS):
            word = _mixed(index, row + 2)
            sign = 1.0 - 2.0 * (word & np.uint64(1)).astype(np.float64)
            bucket = (word >> np.uint64(59)).astype(np.int64)
            sums[row] += np.bincount(bucket, sign * part, WIDTH)
    return sums


def _sample(numbers: NDArray[np.float64], seed: int) -> bytes:
    """A hash byte of each entry, or of 1,024 that the seed draws (with repetition)."""
    n = len(numbers)
    places = np.arange(n, dtype=np.uint64)
    if n > SAMPLE:
        places = _mixed(np.arange(SAMPLE, dtype=np.uint64) ^ np.uint64(seed), 7) % np.uint64(n)
    values = (numbers[places.astype(np.int64)] + 0.0).view(np.uint64)
    words = _mixed(values ^ _mixed(places ^ np.uint64(seed), 8), 9)
    return (words >> np.uint64(56)).astype(np.uint8).tobytes()


__all__ = ["TensorChange", "TensorRecord", "compare", "plain_tensors", "record", "tensor_digest"]
