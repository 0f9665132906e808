"""From what a user names (a file, an address, a live object) to a suspect."""

from __future__ import annotations

import copy
import difflib
import hashlib
import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gradmark.errors import GradmarkError, ModelError, ModelFileError, UsageError
from gradmark.protocols import BlackBox
from gradmark.suspects.callable import CallableSuspect
from gradmark.suspects.checks import brief
from gradmark.suspects.gguf import read_gguf
from gradmark.suspects.http import HttpSuspect
from gradmark.suspects.module import ModuleSuspect
from gradmark.suspects.onnx import OnnxSuspect
from gradmark.suspects.pt2 import open_pt2
from gradmark.suspects.shards import ENDING, read_shards, shards_digest
from gradmark.suspects.weights import fit, read_weights

_PICKLES = (".pt", ".pth", ".bin", ".ckpt", ".pkl")
_READERS: dict[str, Callable[[Path], dict[str, Tensor]]] = {
    ".safetensors": read_weights,
    ".gguf": read_gguf,
    ENDING: read_shards,
}
_KNOWN = ".pt2, .onnx, .safetensors, .safetensors.index.json, .gguf or an http(s):// address"


def open_suspect(
    source: str | Path | nn.Module | Callable[[Tensor], Any] | BlackBox,
    *,
    model: str | Callable[[], nn.Module] | None = None,
    journal: Path | None = None,
) -> BlackBox:
    """The suspect that ``source`` names; a WhiteBox for modules, .pt2 and weights with ``model``.

    ``model`` is a function without arguments that returns the architecture for a file of weights, or
    names one as "MODULE:FACTORY". ``journal`` keeps an endpoint's answers. Raises ModelFileError where
    the file can't be read safely, UsageError where ``model`` is missing or wrong.
    """
    if isinstance(source, nn.Module):
        return ModuleSuspect(source, name=type(source).__name__)
    if not isinstance(source, str | Path):
        if isinstance(source, BlackBox):
            return source
        return CallableSuspect(source, name=getattr(source, "__qualname__", type(source).__name__))
    if str(source).startswith(("http://", "https://")):
        return HttpSuspect(str(source), journal=journal)
    path = Path(source)
    _check_file(path)
    match path.suffix.lower():
        case ".pt2":
            content = path.read_bytes()
            digest = "sha256:" + hashlib.sha256(content).hexdigest()
            module = open_pt2(content, path.name)
            _check_finite(module, path.name)
            return ModuleSuspect(module, name=path.name, digest=digest)
        case ".onnx":
            return OnnxSuspect(path)
        case _:
            return _weights_suspect(path, model)


def _weights_suspect(path: Path, model: str | Callable[[], nn.Module] | None) -> ModuleSuspect:
    """The architecture ``model`` with the weights in ``path``."""
    name = path.name.lower()
    digest = shards_digest if name.endswith(ENDING) else file_digest
    if path.suffix.lower() in _PICKLES:
        module = _from_pickle(path, model)
    elif read := next((r for ending, r in _READERS.items() if name.endswith(ending)), None):
        module = build_model(model, path.name)
        fit(module, read(path), path.name)
    else:
        found = f"the ending {path.suffix!r}"
        raise ModelFileError(f"{path.name} is of no known kind", expected=_KNOWN, found=found)
    return ModuleSuspect(module, name=path.name, digest=digest(path))


def load_factory(name: str) -> Any:
    """The object that "MODULE:NAME" names; the working folder is put on the import path.

    Raises UsageError where the name is malformed, the import fails or the module has no such name.
    """
    module_name, colon, attribute = name.partition(":")
    if not (colon and module_name and attribute):
        raise UsageError("That names no factory", expected="MODULE:FACTORY", found=repr(name))
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)  # as python -m does
    try:
        found: Any = importlib.import_module(module_name)
    except Exception as cause:  # a user's module may fail in any way
        fix = "Run gradmark in the module's folder, or install the module"
        raise UsageError(
            f"The module {module_name!r} can't be imported", found=brief(cause), fix=fix
        ) from cause
    for part in attribute.split("."):
        if not hasattr(found, part):
            names = [n for n in dir(found) if not n.startswith("_") and callable(getattr(found, n))]
            near = difflib.get_close_matches(part, names, n=3)
            fix = (
                f"The nearest names are {', '.join(near)}"
                if near
                else f"It has {', '.join(names[:8]) or 'none'}"
            )
            raise UsageError(f"{module_name!r} has no {part!r}", fix=fix)
        found = getattr(found, part)
    return found


def file_digest(path: str | Path) -> str:
    """``sha256:<hex>`` of a file's bytes."""
    with Path(path).open("rb") as file:
        return "sha256:" + hashlib.file_digest(file, "sha256").hexdigest()


def build_model(model: str | Callable[[], nn.Module] | None, name: str) -> nn.Module:
    """A fresh module from the factory ``model``, for the weights in the file ``name``."""
    if model is None:
        fix = "Give --model MODULE:FACTORY"
        raise UsageError(
            f"{name} holds weights only", expected="the architecture that they belong to", fix=fix
        )
    factory = load_factory(model) if isinstance(model, str) else model
    if isinstance(factory, nn.Module):
        return copy.deepcopy(factory)  # a second suspect of this architecture must not change the first
    try:
        module = factory()
    except GradmarkError:
        raise
    except Exception as cause:
        raise UsageError(f"{model} fails without arguments", found=brief(cause)) from cause
    if not isinstance(module, nn.Module):
        raise UsageError(f"{model} makes no model", expected="a torch.nn.Module", found=type(module).__name__)
    return module


def _from_pickle(path: Path, model: str | Callable[[], nn.Module] | None) -> nn.Module:
    """Weights from a pickled state dict, read by torch's restricted unpickler alone."""
    refusal = {
        "expected": f"{_KNOWN}, or a plain state dict with --model",
        "fix": "Convert it to safetensors where you trust it",
    }
    if model is None:
        raise ModelFileError(f"{path.name} is a pickle, which can run code when it is opened", **refusal)
    try:
        tensors = _unpickled(path)
    except Exception as cause:  # the restricted unpickler raises anything on bytes that are no pickle
        what = f"{path.name} is a pickle that holds more than tensors, or is damaged"
        raise ModelFileError(what, found=type(cause).__name__, **refusal) from cause
    if isinstance(tensors, dict) and isinstance(tensors.get("state_dict"), dict):
        tensors = tensors["state_dict"]
    if (
        not isinstance(tensors, dict)
        or not all(isinstance(value, Tensor) for value in tensors.values())
        or not all(isinstance(name, str) for name in tensors)
    ):
        raise ModelFileError(f"{path.name} is no state dict", found=type(tensors).__name__, **refusal)
    module = build_model(model, path.name)
    fit(module, {key: _written_out(value, path.name) for key, value in tensors.items()}, path.name)
    return module


def _unpickled(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as cause:  # pickle's own error, whose module nothing here imports
        if "torchao" not in str(cause):
            raise
        importlib.import_module("torchao.quantization")  # tells the unpickler of its own tensors
        return torch.load(path, map_location="cpu", weights_only=True)


def _written_out(value: Tensor, name: str) -> Tensor:
    """The numbers that a quantised tensor (torchao's, say) stands for; others as they are."""
    if type(value) in (Tensor, nn.Parameter) and not value.is_quantized:
        return value
    try:
        found: Tensor = value.dequantize()
    except Exception as cause:
        raise ModelFileError(
            f"{name} holds tensors of a kind that can't be written out",
            expected="plain tensors, or ones with dequantize()",
            found=type(value).__name__,
        ) from cause
    return found


def _check_file(path: Path) -> None:
    try:
        if path.is_dir():
            raise ModelFileError(f"{path.name or path} is a folder", expected=_KNOWN)
        if not path.is_file():
            raise ModelFileError(f"There is no file {path.name}", expected=_KNOWN, fix="Check the path")
        if path.stat().st_size == 0:
            raise ModelFileError(f"{path.name} is empty", expected=_KNOWN)
        with path.open("rb"):
            pass
    except OSError as cause:
        raise ModelFileError(f"{path.name} can't be read", found=str(cause.strerror)) from cause


def _check_finite(module: nn.Module, name: str) -> None:
    # parameters only: masks, which may be infinite on purpose, are buffers
    bad = [key for key, value in module.named_parameters() if not bool(torch.isfinite(value).all())]
    if bad:
        found = f"NaN or infinity in {', '.join(bad[:5])}"
        raise ModelError(f"{name} has weights that aren't finite", found=found)
