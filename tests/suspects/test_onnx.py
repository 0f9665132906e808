"""ONNX files answer as the modules that they came from."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from gradmark.errors import ModelError, ModelFileError
from gradmark.suspects import OnnxSuspect, open_suspect

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

WEIGHT = torch.randn(6, 3, generator=torch.Generator().manual_seed(2))


def write(
    path: Path,
    *,
    batch: int | str = "b",
    rank: int = 2,
    labels: bool = False,
    nan: bool = False,
    out: str = "FLOAT",
) -> Path:
    """x (batch, 6) @ weight -> (batch, 3); optionally an integer output before it."""
    helper, kind = onnx.helper, onnx.TensorProto
    values = (WEIGHT * float("nan") if nan else WEIGHT).flatten().tolist()
    nodes = [helper.make_node("MatMul", ["x", "w"], ["product"])]
    outputs = []
    if labels:
        nodes.append(helper.make_node("ArgMax", ["product"], ["label"], axis=1, keepdims=0))
        outputs.append(helper.make_tensor_value_info("label", kind.INT64, [batch]))
    if rank == 2:
        nodes.append(helper.make_node("Cast", ["product"], ["y"], to=getattr(kind, out)))
        outputs.append(helper.make_tensor_value_info("y", getattr(kind, out), [batch, 3]))
    elif rank == 1:
        nodes.append(helper.make_node("ReduceSum", ["product"], ["y"], keepdims=0))
        outputs.append(helper.make_tensor_value_info("y", kind.FLOAT, []))
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", kind.FLOAT, [batch, 6])],
        outputs,
        [helper.make_tensor("w", kind.FLOAT, [6, 3], values)],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    path.write_bytes(model.SerializeToString())
    return path


@pytest.mark.parametrize("batch", ["b", 4, 1])
@pytest.mark.parametrize("b", [1, 4, 7])
def test_free_and_fixed_batch_sizes(tmp_path: Path, batch: int | str, b: int) -> None:
    suspect = open_suspect(write(tmp_path / "m.onnx", batch=batch))
    x = torch.rand(b, 6)
    torch.testing.assert_close(suspect.query(x), x @ WEIGHT)
    torch.testing.assert_close(suspect.query(x.double()), x @ WEIGHT)
    assert suspect.name == "m.onnx" and suspect.digest.startswith("sha256:")


@pytest.mark.parametrize("kind", ["FLOAT", "DOUBLE", "FLOAT16"])
def test_the_first_floating_matrix_is_the_answer(tmp_path: Path, kind: str) -> None:
    suspect = OnnxSuspect(write(tmp_path / "m.onnx", labels=True, out=kind), batch_size=3)
    x = torch.rand(8, 6)
    torch.testing.assert_close(suspect.query(x), x @ WEIGHT, atol=1e-2, rtol=1e-2)


def test_an_exported_module_with_its_weights_beside_it(tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    module = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3), torch.nn.Flatten(), torch.nn.Linear(72, 3)).eval()
    path = tmp_path / "m.onnx"
    torch.onnx.export(module, (torch.rand(2, 1, 8, 8),), path, dynamo=True, external_data=True, verbose=False)
    digest = OnnxSuspect(path).digest
    x = torch.rand(3, 1, 8, 8)
    torch.testing.assert_close(OnnxSuspect(path).query(x), module(x).detach(), atol=1e-5, rtol=1e-4)
    weights = path.with_name("m.onnx.data")
    if weights.exists():
        content = bytearray(weights.read_bytes())
        content[0] ^= 1
        weights.write_bytes(content)
        assert OnnxSuspect(path).digest != digest


def test_weights_in_any_other_file_are_part_of_the_fingerprint(tmp_path: Path) -> None:
    path = write(tmp_path / "m.onnx")
    for name, refused in (("w.bin", False), ("m.onnx.data", False), ("../w.bin", True)):
        folder = tmp_path / "in"
        folder.mkdir(exist_ok=True)
        model = onnx.load(path)
        for tensor in model.graph.initializer:
            raw = onnx.numpy_helper.to_array(tensor).tobytes()
            (folder / name).write_bytes(raw)
            tensor.ClearField("float_data")
            tensor.raw_data = raw
            onnx.external_data_helper.set_external_data(tensor, name, 0, len(raw))
            tensor.ClearField("raw_data")
        (folder / "n.onnx").write_bytes(model.SerializeToString())
        if refused:
            with pytest.raises(ModelFileError):
                OnnxSuspect(folder / "n.onnx")
            continue
        digest = OnnxSuspect(folder / "n.onnx").digest
        content = bytearray((folder / name).read_bytes())
        content[3] ^= 1
        (folder / name).write_bytes(content)
        assert OnnxSuspect(folder / "n.onnx").digest != digest


def test_bytes_are_steps_of_the_range(tmp_path: Path) -> None:
    helper, kind = onnx.helper, onnx.TensorProto
    graph = helper.make_graph(
        [helper.make_node("Cast", ["x"], ["y"], to=kind.FLOAT)], "g",
        [helper.make_tensor_value_info("x", kind.UINT8, ["b", 3])],
        [helper.make_tensor_value_info("y", kind.FLOAT, ["b", 3])],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    (tmp_path / "u.onnx").write_bytes(model.SerializeToString())
    x = torch.tensor([[0.0, 0.5, 1.0], [0.1, 0.9, 0.999]])
    assert OnnxSuspect(tmp_path / "u.onnx").query(x).tolist() == [[0, 128, 255], [26, 230, 255]]


def test_a_huge_fixed_batch_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match="huge batches"):
        OnnxSuspect(write(tmp_path / "m.onnx", batch=10**10))


def test_nonsense_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="aren't finite"):
        OnnxSuspect(write(tmp_path / "nan.onnx", nan=True)).query(torch.rand(2, 6))
    with pytest.raises(ModelError, match="wrong shape"):
        OnnxSuspect(write(tmp_path / "rank.onnx", rank=1)).query(torch.rand(2, 6))
    with pytest.raises(ModelError, match="fails on inputs of shape"):
        OnnxSuspect(write(tmp_path / "m.onnx")).query(torch.rand(2, 5))
    with pytest.raises(ModelFileError, match=r"no class scores.*label: tensor\(int64\)"):
        OnnxSuspect(write(tmp_path / "labels.onnx", labels=True, rank=0))


@pytest.mark.parametrize("content", [b"hello", b"\x80\x04.", b"PK\x03\x04", b"\0" * 100])
def test_other_files_are_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(content)
    with pytest.raises(ModelFileError, match=r"m\.onnx"):
        open_suspect(path)


def test_a_truncated_file_is_refused(tmp_path: Path, record_property: Any) -> None:
    path = write(tmp_path / "m.onnx")
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(ModelFileError) as caught:
        open_suspect(path)
    record_property("refusal", str(caught.value).replace(f"{tmp_path}/", ""))


def test_a_missing_onnxruntime_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ModelFileError, match=r"pip install gradmark\[onnx\]"):
        OnnxSuspect(write(tmp_path / "m.onnx"))
