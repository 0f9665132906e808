"""State dicts and GGUF files that are whole, and hold what no weights are: one clear error each."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from gradmark import open_suspect
from gradmark.errors import GradmarkError, ModelFileError


def net() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(8, 3))


WEIGHT, BIAS = torch.randn(3, 8), torch.zeros(3)
ODD: dict[str, Callable[[], Any]] = {
    "numbered": lambda: {0: WEIGHT},
    "mixed names": lambda: {"1.weight": WEIGHT, "1.bias": BIAS, 5: WEIGHT},
    "meta": lambda: {"1.weight": WEIGHT.to("meta"), "1.bias": BIAS},
    "sparse": lambda: {"1.weight": WEIGHT.to_sparse(), "1.bias": BIAS},
    "compressed": lambda: {"1.weight": WEIGHT.to_sparse_csr(), "1.bias": BIAS},
    "complex": lambda: {"1.weight": (WEIGHT * torch.nan).to(torch.complex64), "1.bias": BIAS},
    "nested": lambda: {"1.weight": torch.nested.nested_tensor([WEIGHT]), "1.bias": BIAS},
    "nested twice": lambda: {"state_dict": {"state_dict": {"1.weight": WEIGHT, "1.bias": BIAS}}},
}


@pytest.mark.filterwarnings("ignore:Sparse CSR", "ignore:The PyTorch API of nested")
@pytest.mark.parametrize("name", ODD)
def test_a_state_dict_of_what_no_weights_are(tmp_path: Path, name: str) -> None:
    path = tmp_path / "model.pt"
    torch.save(ODD[name](), path)
    with pytest.raises(ModelFileError, match=r"no state dict|of a sort that weights aren't"):
        open_suspect(path, model=net)


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.bfloat16, torch.float8_e4m3fn, torch.int8, torch.uint16]
)
def test_numbers_of_any_width_are_weights(tmp_path: Path, dtype: torch.dtype) -> None:
    torch.save({"1.weight": WEIGHT.abs().to(dtype), "1.bias": BIAS}, tmp_path / "model.pt")
    open_suspect(tmp_path / "model.pt", model=net)


def test_names_give_no_orders_to_a_terminal(tmp_path: Path) -> None:
    torch.save({"1.weight": WEIGHT, "1.bias": BIAS, "x\x1b]0;pwned\x1b\\": BIAS}, tmp_path / "model.pt")
    with pytest.raises(ModelFileError) as caught:
        open_suspect(tmp_path / "model.pt", model=net)
    assert "pwned" in str(caught.value)
    assert "\x1b" not in str(caught.value)
    assert "\x1b" not in caught.value.found


def test_every_error_is_visible() -> None:
    error = GradmarkError("a\x1b[2Jb", expected="c\u202ed", found="e\x07", fix="f\x9b")
    assert not set(str(error)) & set("\x1b\u202e\x07\x9b")
    assert "a\ufffd[2Jb" in str(error)


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


def gguf(tensors: int, fields: int, body: bytes, version: int = 3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, tensors, fields) + body


@pytest.mark.parametrize(
    "content",
    [
        gguf(0, 1, text("a") + struct.pack("<IIQ", 9, 0, 1 << 40)),
        gguf(0, 1, text("a") + struct.pack("<IIQ", 9, 8, 1 << 40)),
        gguf(0, 1, text("a") + struct.pack("<IIQ", 9, 9, 1) * 40),
        gguf(0, 1 << 40, b""),
        gguf(1 << 40, 0, b""),
        gguf(0, 1, struct.pack("<Q", 1 << 60)),
        gguf(1, 0, text("w") + struct.pack("<I", 1 << 31)),
        gguf(0, 1, text("a") + struct.pack("<I", 77)),
        gguf(0, 0, b"", version=9),
        b"GGUF",
    ],
)
def test_a_small_gguf_file_that_claims_to_be_large_is_refused_at_once(tmp_path: Path, content: bytes) -> None:
    pytest.importorskip("gguf", reason="gguf is missing", exc_type=ImportError)
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    with pytest.raises(ModelFileError, match="can't be read as GGUF"):
        open_suspect(path, model=net)
