"""Opening a stranger's ``.pt2`` (torch.export) file without running anything it brings along.

``torch.export.load`` isn't safe on hostile files: payloads marked ``use_pickle`` and opaque objects
are unpickled, sample inputs fall back to a full unpickling, compiled parts are loaded as shared
libraries, symbolic shapes go through sympy's ``eval``, and a graph may name any callable under
``torch``. So this module never hands it the file. It reads the archive, checks every record and
every string of the graph against short lists of what an exported network needs, and has torch load
a new archive made of nothing but the checked parts: raw weights, raw constants, the graph.
"""

from __future__ import annotations

import io
import json
import logging
import math
import re
import zipfile
from typing import Any

import torch
from torch import Tensor, nn

from gradmark.errors import ModelFileError
from gradmark.suspects.checks import MOST_AT_ONCE, brief, unwrap
from gradmark.suspects.expressions import harmless

_GRAPH = "models/model.json"
_WEIGHTS = "data/weights/model_weights_config.json"
_CONSTANTS = "data/constants/model_constants_config.json"

_NAMESPACES = {"aten", "prims", "quantized_decomposed", "torchvision"}
_HIGHER_ORDER = {"wrap_with_set_grad_enabled", "wrap_with_autocast", "cond", "map_impl"}
_FILE_OPERATORS = {"aten.from_file", "aten.save"}
_PLAIN = re.compile(
    r"_operator\.(add|sub|mul|truediv|floordiv|mod|pow|neg|pos|getitem|eq|ne|lt|le|gt|ge|and_|or_|not_)"
    r"|math\.(ceil|floor|trunc|sqrt|pow)|torch\.sym_(int|float|max|min|not|ite|sqrt)",
    re.ASCII,
)
_TREES = {None, "builtins.tuple", "builtins.list", "builtins.dict", "collections.OrderedDict"}
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*|", re.ASCII)
_TEXT = re.compile(r"[\w.\-:/, >+]{0,512}", re.ASCII)
_SHARED = 1 << 24
_PAYLOAD = re.compile(r"(weight|tensor)_\d+", re.ASCII)


def open_pt2(content: bytes, name: str) -> nn.Module:
    """The network in a ``.pt2`` file's bytes. Raises ModelFileError where it isn't one, or isn't safe."""
    records = _records(content, name)
    try:
        graph = json.loads(records[_GRAPH])
        configs = {key: json.loads(records[key])["config"] for key in (_WEIGHTS, _CONSTANTS)}
        payloads = _check_payloads(configs, records, name)
        graph = _check_graph(graph, name)
    except (LookupError, TypeError, ValueError, AttributeError, RecursionError) as cause:
        raise _damaged(name, brief(cause)) from cause
    logger = logging.getLogger("torch.export")
    quiet, logger.disabled = logger.disabled, True  # it logs a stack trace for a damaged file
    try:
        clean = io.BytesIO(_rebuild(graph, configs, payloads))
        program = torch.export.load(clean)
        return _any_batch(program.module(), program)
    except Exception as cause:  # torch raises all kinds of exceptions on damaged archives
        raise _damaged(name, brief(cause)) from cause
    finally:
        logger.disabled = quiet


def _any_batch(module: nn.Module, program: torch.export.ExportedProgram) -> nn.Module:
    """``module``, or where its batch axis was exported with a fixed size, one that fills up to that."""
    names = set(program.graph_signature.user_inputs)
    sizes = [node.meta["val"].shape[0] for node in program.graph.nodes
             if node.op == "placeholder" and node.name in names and node.meta["val"].ndim]  # fmt: skip
    fixed = len(sizes) == 1 and isinstance(sizes[0], int)
    return Filled(module, sizes[0]) if fixed and 0 < sizes[0] <= MOST_AT_ONCE else module


class Filled(nn.Module):
    """A program of a fixed batch size: asked in parts of that, the last filled up with its last input."""

    def __init__(self, module: nn.Module, size: int) -> None:
        super().__init__()
        self.module, self.size = module, size

    def forward(self, x: Tensor) -> Tensor:
        found = []
        for part in x.split(self.size):
            filled = torch.cat([part, part[-1:].expand(self.size - len(part), *part.shape[1:])])
            found.append(unwrap(self.module(filled))[: len(part)])
        return torch.cat(found)


def _records(content: bytes, name: str) -> dict[str, bytes]:
    """The archive's records by name, without the root folder."""
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            infos = archive.infolist()
            names = [info.filename.partition("/")[2] for info in infos]
            if len(set(names)) != len(names) or len({info.filename.split("/")[0] for info in infos}) != 1:
                raise _unsafe(name, "an archive with records under doubtful names")
            # exported archives are stored, not deflated: a small file can't become a huge one
            if any(info.compress_type for info in infos) or sum(info.file_size for info in infos) > len(
                content
            ):
                raise _unsafe(name, "an archive with compressed records")
            records = {key: archive.read(info) for key, info in zip(names, infos, strict=True)}
    except (zipfile.BadZipFile, OSError, EOFError, ValueError, NotImplementedError, RuntimeError) as cause:
        raise _damaged(name, brief(cause)) from cause
    _check_layout(records, name)
    return records


def _check_layout(records: dict[str, bytes], name: str) -> None:
    """Refuse the kinds of records that torch would run or unpickle."""
    if _GRAPH not in records:
        if any(key.endswith(".pkl") for key in records):
            raise _unsafe(name, "a pickle (torch.save or TorchScript)")
        raise _damaged(name, "an archive without models/model.json")
    for key in records:
        folder = key.rpartition("/")[0]
        if folder == "data/aotinductor" or key.startswith("data/aotinductor/"):
            raise _unsafe(name, "compiled code (AOTInductor)")
        if folder in ("data/weights", "data/constants") and key.endswith(".pt"):
            raise _unsafe(name, "weights pickled by an old version of torch")
        if folder == "models" and key != _GRAPH:
            raise _unsafe(name, f"more than one model ({key[:60]})")
    if records.get("byteorder", b"little") != b"little":
        raise _damaged(name, "weights of a big-endian machine")


def _check_payloads(configs: dict[str, Any], records: dict[str, bytes], name: str) -> dict[str, bytes]:
    """The raw tensors that the two tables name; refuses whatever torch would unpickle."""
    payloads = {}
    for config, table in configs.items():
        folder = config.rpartition("/")[0]
        for key, meta in table.items():
            path = meta["path_name"]
            if meta["use_pickle"] is not False or not _PAYLOAD.fullmatch(path):
                raise _unsafe(name, f"a pickled part, {str(path)[:60]!r}")
            _check_text(key, "name", name, _TEXT)
            content = records[f"{folder}/{path}"]
            shape = [size["as_int"] for size in meta["tensor_meta"]["sizes"]]
            # torch allocates what an empty record claims to be; a real one has nothing to allocate
            if not content and math.prod(shape):
                raise _damaged(name, f"no bytes for the tensor {key[:60]!r}")
            # entries may share bytes (strides of zero), but not so many that looking at them fills the memory
            if math.prod(shape) > max(len(content), _SHARED):
                raise _damaged(name, f"{len(content)} bytes for {math.prod(shape)} numbers of {key[:60]!r}")
            payloads[f"{folder}/{path}"] = content
    return payloads


def _check_graph(graph: dict[str, Any], name: str) -> dict[str, Any]:
    """The graph without its notes (stack traces, guards' source code), checked string by string."""
    _strip(graph)
    _walk(graph, "", name)
    return graph


def _strip(value: Any) -> None:
    if isinstance(value, dict):
        if isinstance(value.get("metadata"), dict):
            value["metadata"] = {}
        if "guards_code" in value:
            value["guards_code"] = []
        for item in value.values():
            _strip(item)
    elif isinstance(value, list):
        for item in value:
            _strip(item)


def _walk(value: Any, key: str, name: str) -> None:
    if isinstance(value, dict):
        for inner, item in value.items():
            _check_text(inner, key, name, _TEXT)
            if inner in ("as_custom_obj", "custom_obj"):
                raise _unsafe(name, "a custom object")
            _walk(item, inner, name)
    elif isinstance(value, list):
        for item in value:
            _walk(item, key, name)
    elif isinstance(value, str):
        _check_string(value, key, name)


def _check_string(value: str, key: str, name: str) -> None:
    if key in ("target", "as_operator"):
        _check_target(value, name)
    elif key == "expr_str":
        if not harmless(value):
            raise _unsafe(name, f"the expression {value[:60]!r}")
    elif key in ("in_spec", "out_spec"):
        if value:
            _check_tree(json.loads(value)[1], name)
    else:
        _check_text(value, key, name, _NAME if key in ("name", "as_name", "forward_arg_names") else _TEXT)


def _check_text(value: Any, key: str, name: str, allowed: re.Pattern[str]) -> None:
    # torch writes these strings into the source code of the module that it generates
    if not isinstance(value, str) or not allowed.fullmatch(value):
        raise _unsafe(name, f"the text {str(value)[:60]!r} as {key or 'a name'}")


def _check_target(target: str, name: str) -> None:
    parts = target.split(".")
    if parts[:2] == ["torch", "ops"] and len(parts) == 4 and parts[2] == "higher_order":
        allowed = parts[3] in _HIGHER_ORDER
    elif parts[:2] == ["torch", "ops"] and len(parts) == 5 and parts[2] in _NAMESPACES:
        operator: Any = torch.ops
        for part in parts[2:]:
            operator = getattr(operator, part, None)
        allowed = isinstance(operator, torch._ops.OpOverload) and ".".join(parts[2:4]) not in _FILE_OPERATORS
        allowed = allowed and not any(arg.name == "filename" for arg in operator._schema.arguments)
    else:
        allowed = bool(_PLAIN.fullmatch(target))
    if not allowed:
        raise _unsafe(name, f"a call of {target[:60]!r}")


def _check_tree(tree: dict[str, Any], name: str) -> None:
    context = json.loads(tree["context"]) if tree["context"] else None
    plain = context is None or (
        isinstance(context, list) and all(isinstance(key, str | int) for key in context)
    )
    if tree["type"] not in _TREES or not plain:
        raise _unsafe(name, f"inputs or outputs of type {str(tree['type'])[:60]!r}")
    for key in context or ():
        _check_text(str(key), "a dictionary's key", name, _TEXT)
    for child in tree["children_spec"]:
        _check_tree(child, name)


def _rebuild(graph: dict[str, Any], configs: dict[str, Any], payloads: dict[str, bytes]) -> bytes:
    from torch.export.pt2_archive._package import PT2ArchiveWriter

    buffer = io.BytesIO()
    with PT2ArchiveWriter(buffer) as writer:
        writer.write_bytes(_GRAPH, json.dumps(graph).encode())
        for key, table in configs.items():
            writer.write_bytes(key, json.dumps({"config": table}).encode())
        for key, content in payloads.items():
            writer.write_bytes(key, content)
        writer.write_bytes("data/sample_inputs/model.pt", b"")
    return buffer.getvalue()


def _unsafe(name: str, found: str) -> ModelFileError:
    return ModelFileError(
        f"{name} isn't safe to open",
        expected="a torch.export file of raw weights and known operators",
        found=found,
        fix="Export it again with torch.export.save, or save its weights as .safetensors",
    )


def _damaged(name: str, found: str) -> ModelFileError:
    fix = "Save it again with torch.export.save"
    return ModelFileError(f"{name} can't be read", expected="a torch.export file", found=found, fix=fix)
