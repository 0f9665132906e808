"""Weights in several ``.safetensors`` files, held together by ``NAME.safetensors.index.json``."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from torch import Tensor

from gradmark.errors import ModelFileError
from gradmark.suspects.weights import read_weights

ENDING = ".safetensors.index.json"
_LARGEST = 32 * 2**20


def read_shards(index: Path) -> dict[str, Tensor]:
    """Every tensor that ``index`` names, each from the file that it is said to be in.

    Raises ModelFileError where the index isn't one, names a file outside its own folder, or where a
    file is missing, damaged or holds other tensors.
    """
    places = _places(index)
    found: dict[str, Tensor] = {}
    for shard in sorted(set(places.values())):
        own = {name for name, place in places.items() if place == shard}
        path = index.with_name(shard)
        if not path.is_file():
            raise _wrong(index, "the files that it names beside it", f"no {shard}")
        tensors = read_weights(path)
        if set(tensors) != own:
            odd = sorted(set(tensors) ^ own)
            raise _wrong(index, f"{len(own)} tensors in {shard}", f"a difference in {', '.join(odd[:5])}")
        found |= tensors
    return found


def shards_digest(index: Path) -> str:
    """``sha256:<hex>`` of the index and then of each file that it names, in the order of their names."""
    total = hashlib.sha256(index.read_bytes())
    for shard in sorted(set(_places(index).values())):
        with index.with_name(shard).open("rb") as file:
            total.update(hashlib.file_digest(file, "sha256").digest())
    return "sha256:" + total.hexdigest()


def _places(index: Path) -> dict[str, str]:
    """The file of every tensor."""
    expected = '{"weight_map": {tensor: file}}, files in the same folder'
    try:
        if index.stat().st_size > _LARGEST:
            raise _wrong(index, "32 MiB at most", f"{index.stat().st_size} bytes")
        said: Any = json.loads(index.read_bytes())
        places = said["weight_map"]
        good = isinstance(places, dict) and places and all(map(_plain, places.values()))
    except OSError as cause:
        raise ModelFileError(f"{index.name} can't be read", found=str(cause.strerror)) from cause
    except (ValueError, TypeError, KeyError, RecursionError) as cause:
        raise _wrong(index, expected, "no such JSON") from cause
    if not good:
        raise _wrong(index, expected, "other names of files")
    return dict(places)


def _plain(name: Any) -> bool:
    """Whether this names a safetensors file in the same folder, and nothing else."""
    text = isinstance(name, str) and name.endswith(".safetensors")
    return text and name == Path(name).name and "\\" not in name


def _wrong(index: Path, expected: str, found: str) -> ModelFileError:
    return ModelFileError(
        f"{index.name} doesn't hold a model together",
        expected=expected,
        found=found,
        fix="Copy or download all files of the model again",
    )
