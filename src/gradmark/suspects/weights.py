"""Weights as ``.safetensors``: written atomically, read only where every tensor fits."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gradmark.errors import ModelError, ModelFileError, OutputPathError
from gradmark.suspects.checks import brief

_REAL = {
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2,
    torch.float8_e4m3fnuz, torch.float8_e5m2fnuz, torch.int64, torch.int32, torch.int16, torch.int8,
    torch.uint64, torch.uint32, torch.uint16, torch.uint8, torch.bool,
}  # fmt: skip


def save_weights(module: nn.Module, path: str | Path) -> None:
    """Write the state dict to ``path``, whole or not at all; tied tensors are written once each name.

    The file at ``path`` is replaced in one step after its successor is on the disk. Raises
    OutputPathError where it can't be written.
    """
    from safetensors.torch import save

    path = Path(path)
    tensors: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, value in module.state_dict().items():
        if isinstance(value, Tensor):
            value = value.detach().cpu().contiguous()
            # the format has no aliases, and refuses tensors that share memory
            tensors[name] = value.clone() if value.untyped_storage().data_ptr() in seen else value
            seen.add(tensors[name].untyped_storage().data_ptr())
    temporary = None
    try:
        descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        with os.fdopen(descriptor, "wb") as file:
            file.write(save(tensors))
            file.flush()
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        Path(temporary).chmod(0o666 & ~umask)
        Path(temporary).replace(path)
        temporary = None
    except OSError as cause:
        found = str(cause.strerror)
        fix = "Name a file in a folder that you can write to"
        raise OutputPathError(f"{path.name} can't be written", found=found, fix=fix) from cause
    finally:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)


def load_weights(module: nn.Module, path: str | Path) -> None:
    """Read ``path`` into ``module``, in place.

    Raises ModelFileError where the file isn't a whole safetensors file or its tensors aren't the
    module's (lists what differs), ModelError where a weight is NaN or infinite. The module is
    unchanged after an error.
    """
    fit(module, read_weights(path), Path(path).name)


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """Every tensor in ``path`` by name. Raises ModelFileError where it isn't a whole safetensors file."""
    path = Path(path)
    check_header(path)
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(str(path))
    except (SafetensorError, OSError, ValueError) as cause:
        raise _damaged(path, brief(cause)) from cause


def fit(module: nn.Module, tensors: dict[str, Tensor], name: str) -> None:
    """Load ``tensors`` into ``module`` if every one fits; raises as ``load_weights`` does."""
    odd = [f"{k}, {sort}" for k, v in tensors.items() if (sort := _sort(v))]
    if odd:
        raise ModelFileError(
            f"{name} holds tensors of a sort that weights aren't", expected="plain tensors of real numbers",
            found=_at_most_five(odd), fix="Convert it to safetensors",
        )  # fmt: skip
    own = {
        key: value for key, value in module.state_dict(keep_vars=True).items() if isinstance(value, Tensor)
    }
    given = {id(own[key]) for key in tensors if key in own}
    # a file may hold tied tensors under one of their names only
    missing = [key for key, value in own.items() if key not in tensors and id(value) not in given]
    unexpected = [key for key in tensors if key not in own]
    shapes = [
        f"{key} {tuple(tensors[key].shape)} instead of {tuple(value.shape)}"
        for key, value in own.items()
        if key in tensors and tensors[key].shape != value.shape
    ]
    if missing or unexpected or shapes:
        lists = [("missing", missing), ("unexpected", unexpected), ("shape", shapes)]
        found = "; ".join(f"{label}: {_at_most_five(items)}" for label, items in lists if items)
        raise ModelFileError(
            f"{name} doesn't fit {type(module).__name__}",
            expected=f"its {len(own)} tensors",
            found=found,
            fix="Name with --model the factory of the architecture that was saved, with its names of tensors",
        )
    bad = [
        k for k, v in tensors.items() if v.is_floating_point() and not bool(torch.isfinite(v.float()).all())
    ]
    if bad:
        raise ModelError(
            f"{name} has weights that aren't finite", found=f"NaN or infinity in {_at_most_five(bad)}"
        )
    try:
        module.load_state_dict(tensors, strict=False)  # strictness is checked above, with tied names allowed
    except (RuntimeError, NotImplementedError, TypeError) as cause:
        raise ModelFileError(f"{name} doesn't fit {type(module).__name__}", found=brief(cause)) from cause


def _sort(value: Tensor) -> str:
    """What is odd about a tensor, or nothing."""
    if value.layout != torch.strided or value.is_nested:
        return "nested" if value.is_nested else str(value.layout).removeprefix("torch.")
    if value.is_meta:
        return "without numbers"
    return "" if value.dtype in _REAL else str(value.dtype).removeprefix("torch.")


def check_header(path: Path) -> None:
    """Refuse what only bears the name: a pickle, a zip, a text, or a file cut short."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(16)
            length = int.from_bytes(start[:8], "little")
            if start[:2] == b"PK" or (start[:1] == b"\x80" and 2 <= (start[1:2] or b"\0")[0] <= 5):
                raise ModelFileError(
                    f"{path.name} isn't a safetensors file",
                    expected="a safetensors header",
                    found="a zip archive or pickle under that name",
                    fix="Convert it to safetensors where you trust it; gradmark never unpickles",
                )
            if len(start) < 9 or length > size - 8:
                raise _damaged(path, f"{size} bytes, of which the header claims {length}")
            file.seek(8)
            header: Any = json.loads(file.read(length))
    except OSError as cause:
        raise ModelFileError(f"{path.name} can't be read", found=str(cause.strerror)) from cause
    except (ValueError, RecursionError) as cause:
        raise _damaged(path, "a header that isn't JSON") from cause
    if not isinstance(header, dict):
        raise _damaged(path, "a header that isn't a JSON object")


def _damaged(path: Path, found: str) -> ModelFileError:
    fix = "Copy or download it again"
    return ModelFileError(
        f"{path.name} is damaged", expected="a whole safetensors file", found=found, fix=fix
    )


def _at_most_five(items: list[str]) -> str:
    rest = f" and {len(items) - 5} more" if len(items) > 5 else ""
    return ", ".join(items[:5]) + rest
