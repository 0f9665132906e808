"""Weights in several files, in GGUF and in torchao's tensors: read as what was saved, or refused."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from gradmark.errors import ModelError, ModelFileError
from gradmark.protocols import WhiteBox
from gradmark.suspects import ModuleSuspect, open_suspect

X = torch.rand(5, 64, generator=torch.Generator().manual_seed(1))


def network() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(2)
        return nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 4))


def empty() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 4))


def sharded(folder: Path, change: Callable[[dict[str, Any]], None] = lambda _: None) -> Path:
    state = network().state_dict()
    places = {name: f"model-{1 + (name[0] > '0')}.safetensors" for name in state}
    for file in set(places.values()):
        save_file({n: v for n, v in state.items() if places[n] == file}, folder / file)
    index: dict[str, Any] = {"metadata": {"total_size": 0}, "weight_map": places}
    change(index)
    path = folder / "model.safetensors.index.json"
    path.write_text(json.dumps(index))
    return path


def test_shards_read_as_one(tmp_path: Path) -> None:
    suspect = open_suspect(sharded(tmp_path), model=empty)
    assert isinstance(suspect, WhiteBox)
    torch.testing.assert_close(suspect.query(X), ModuleSuspect(network()).query(X), rtol=0, atol=0)
    digest = suspect.digest
    assert open_suspect(sharded(tmp_path), model=empty).digest == digest
    state = network().state_dict()
    save_file({n: v + 1 for n, v in state.items() if n[0] == "0"}, tmp_path / "model-1.safetensors")
    assert open_suspect(tmp_path / "model.safetensors.index.json", model=empty).digest != digest


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda index: index.pop("weight_map"), "no such JSON"),
        (lambda index: index.update(weight_map=[]), "other names of files"),
        (lambda index: index.update(weight_map={"0.weight": "../model-1.safetensors"}), "other names"),
        (lambda index: index.update(weight_map={"0.weight": "/etc/model.safetensors"}), "other names"),
        (lambda index: index.update(weight_map={"0.weight": "model.bin"}), "other names"),
        (lambda index: index["weight_map"].update(more="model-9.safetensors"), "no model-9"),
        (lambda index: index["weight_map"].update(more="model-1.safetensors"), "difference in more"),
        (lambda index: index["weight_map"].pop("0.bias"), r"difference in 0\.bias"),
    ],
)
def test_an_index_that_lies_is_refused(tmp_path: Path, change: Any, words: str) -> None:
    with pytest.raises(ModelFileError, match=words):
        open_suspect(sharded(tmp_path, change), model=empty)


def test_a_damaged_shard_is_named(tmp_path: Path, record_property: Any) -> None:
    index = sharded(tmp_path)
    (tmp_path / "model-2.safetensors").write_bytes((tmp_path / "model-2.safetensors").read_bytes()[:-7])
    with pytest.raises(ModelFileError, match=r"model-2\.safetensors is damaged") as caught:
        open_suspect(index, model=empty)
    record_property("refusal", str(caught.value))


# --- GGUF -------------------------------------------------------------------------------------------------


def written(path: Path, kind: str, state: dict[str, Tensor] | None = None) -> Path:
    """The network's weights by the package's own writer, matrices in ``kind``."""
    gguf = pytest.importorskip("gguf")
    quantised = getattr(gguf.GGMLQuantizationType, kind)
    writer = gguf.GGUFWriter(path, "network")
    for name, value in (network().state_dict() if state is None else state).items():
        if value.ndim == 2 and kind != "F32":
            data = gguf.quantize(value.numpy(), quantised)
            writer.add_tensor(name, data, raw_dtype=quantised)
        else:
            writer.add_tensor(name, value.numpy().astype(np.float32))
    for write in ("header_to_file", "kv_data_to_file", "tensors_to_file"):
        getattr(writer, f"write_{write}")()
    writer.close()
    return path


@pytest.mark.parametrize(("kind", "error"), [("F32", 0.0), ("F16", 1e-3), ("BF16", 1e-2), ("Q8_0", 1e-2)])
def test_gguf_reads_as_what_was_written(tmp_path: Path, kind: str, error: float) -> None:
    suspect = open_suspect(written(tmp_path / "model.gguf", kind), model=empty)
    assert isinstance(suspect, WhiteBox)
    torch.testing.assert_close(suspect.query(X), ModuleSuspect(network()).query(X), rtol=0, atol=error)


def test_gguf_of_another_architecture_is_listed(tmp_path: Path, record_property: Any) -> None:
    state = {"blk.0.weight": torch.ones(4, 32), "0.weight": torch.ones(2, 2)}
    with pytest.raises(
        ModelFileError, match=r"missing: 0\.bias.*unexpected: blk\.0.*shape: 0\.weight"
    ) as caught:
        open_suspect(written(tmp_path / "model.gguf", "F32", state), model=empty)
    record_property("refusal", str(caught.value))


@pytest.mark.parametrize("keep", [1, 4, 20, 60, 200, 0.5, 0.99])
@pytest.mark.filterwarnings("ignore")
def test_cut_and_changed_gguf_is_refused(tmp_path: Path, keep: float) -> None:
    path = written(tmp_path / "model.gguf", "Q8_0")
    content = path.read_bytes()
    path.write_bytes(content[: int(keep if keep >= 1 else keep * len(content))])
    with pytest.raises(ModelFileError, match=r"model\.gguf"):
        open_suspect(path, model=empty)


@pytest.mark.filterwarnings("ignore")
def test_whatever_byte_of_the_head_is_changed_the_error_is_ours(tmp_path: Path) -> None:
    content = written(tmp_path / "whole.gguf", "Q8_0").read_bytes()
    generator = torch.Generator().manual_seed(3)
    for number in range(60):
        changed = bytearray(content)
        place = int(torch.randint(300, (), generator=generator))
        changed[place] = int(torch.randint(256, (), generator=generator))
        path = tmp_path / f"{number}.gguf"
        path.write_bytes(bytes(changed))
        with contextlib.suppress(ModelFileError, ModelError):
            open_suspect(path, model=empty)


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written(tmp_path / "model.gguf", "F32")
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    with pytest.raises(ModelFileError, match=r"pip install 'gradmark\[gguf\]'"):
        open_suspect(path, model=empty)


# --- torchao ----------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("imported", [True, False])
def test_a_state_dict_of_quantised_tensors_is_written_out(tmp_path: Path, imported: bool) -> None:
    ao = pytest.importorskip("torchao.quantization")
    model, path = network(), tmp_path / "model.pt"
    ao.quantize_(model, ao.Int8WeightOnlyConfig(version=2))
    torch.save(model.state_dict(), path)
    true = ModuleSuspect(model).query(X)
    if imported:
        suspect = open_suspect(path, model=empty)
        assert isinstance(suspect, WhiteBox)
        torch.testing.assert_close(suspect.query(X), true, rtol=0, atol=1e-5)
    else:  # the unpickler has not been told of these tensors yet
        program = (
            "import sys; sys.path[:0] = sys.argv[3:]; import torch;"
            "from gradmark.suspects import open_suspect;"
            "suspect = open_suspect(sys.argv[1], model='test_stored:empty');"
            "torch.save(suspect.query(torch.load(sys.argv[2])), sys.argv[2])"
        )
        torch.save(X, tmp_path / "x")
        command = [sys.executable, "-W", "ignore", "-c", program, str(path), str(tmp_path / "x"), *sys.path]
        subprocess.run(command, check=True, cwd=Path(__file__).parent, capture_output=True)
        torch.testing.assert_close(torch.load(tmp_path / "x"), true, rtol=0, atol=1e-5)


class Odd(Tensor):
    """No plain tensor, and nothing that could be written out as one."""

    def dequantize(self) -> Tensor:
        raise NotImplementedError


def test_other_kinds_of_tensors_are_refused(tmp_path: Path) -> None:
    state = {name: value.as_subclass(Odd) for name, value in network().state_dict().items()}
    torch.save(state, tmp_path / "model.pt")
    with (
        torch.serialization.safe_globals([Odd]),
        pytest.raises(ModelFileError, match=r"can't be written out.*Odd|holds more than tensors"),
    ):
        open_suspect(tmp_path / "model.pt", model=empty)
