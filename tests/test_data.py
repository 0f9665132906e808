"""Data as users hand it over, well made and badly."""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gradmark.data import Data, load_data, to_float
from gradmark.errors import DataError, UsageError
from gradmark.protocols import ModelSpec

LABELS = np.arange(12) % 3


def load(path: Path, **arrays: Any) -> Data:
    np.savez(path / "data.npz", **arrays)
    return load_data(str(path / "data.npz"))


def test_digits() -> None:
    pytest.importorskip("sklearn")
    data = load_data("digits")
    assert data.spec == ModelSpec("image", (1, 8, 8), 10, 0.0, 1.0)
    assert data.train is not None
    assert (len(data.train), len(data.test)) == (1197, 600)
    x, labels = data.test.all()
    assert (x.dtype, x.shape, labels.dtype) == (torch.float32, (600, 1, 8, 8), torch.int64)
    assert (float(x.min()), float(x.max())) == (0.0, 1.0)


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((12, 6, 5, 3), (3, 6, 5)),
        ((12, 6, 5, 1), (1, 6, 5)),
        ((12, 6, 5), (1, 6, 5)),
        ((12, 3, 6, 5), (3, 6, 5)),
        ((12, 1, 6, 5), (1, 6, 5)),
        ((12, 3, 6, 3), (3, 6, 3)),
    ],
)
def test_bytes_are_images(tmp_path: Path, shape: tuple[int, ...], expected: tuple[int, ...]) -> None:
    raw = np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)
    data = load(tmp_path, x=raw, y=LABELS)
    assert data.train is None
    assert data.spec == ModelSpec("image", expected, 3, 0.0, 1.0, 255)
    assert data.test.x.dtype == torch.uint8
    x, labels = data.test.batch(slice(2, 6))
    assert x.shape == (4, *expected)
    assert labels.tolist() == [2, 0, 1, 2]
    turned = (
        np.moveaxis(raw, 3, 1) if len(shape) == 4 and shape[1:] != expected else raw.reshape(12, *expected)
    )
    np.testing.assert_array_equal(x.numpy(), (turned[2:6] / 255).astype(np.float32))
    torch.testing.assert_close(data.spec.snap(x), x)


@pytest.mark.parametrize("shape", [(12, 50), (12, 2, 50)])
def test_int16_is_sound(tmp_path: Path, shape: tuple[int, ...]) -> None:
    raw = np.random.default_rng(0).integers(-32768, 32768, shape).astype(np.int16)
    data = load(tmp_path, x=raw, y=LABELS)
    assert (data.spec.domain, data.spec.input_shape) == ("signal", shape[1:])
    assert (data.spec.low, data.spec.high) == (-1.0, 32767 / 32768)  # what int16 can express
    x, _ = data.test.all()
    np.testing.assert_array_equal(x.numpy(), raw.astype(np.float32) / 32768)
    torch.testing.assert_close(data.spec.snap(x), x)


def test_floats_stay_as_they_are(tmp_path: Path) -> None:
    raw = np.random.default_rng(0).normal(5, 3, (12, 7))
    data = load(tmp_path, x=raw, y=LABELS)
    assert (data.spec.domain, data.spec.low, data.spec.high) == ("vector", None, None)
    assert data.spec.scale == pytest.approx(raw.std(), abs=1e-3)
    np.testing.assert_array_equal(data.test.all()[0].numpy(), raw.astype(np.float32))
    image = load(tmp_path, x=raw.reshape(12, 1, 7, 1).repeat(7, 3), y=LABELS)
    assert image.spec.domain == "image"
    assert image.spec.low is None
    unit = load(tmp_path, x=np.random.default_rng(0).random((12, 8, 8)), y=LABELS)
    assert unit.spec == ModelSpec("image", (1, 8, 8), 3, 0.0, 1.0)


def test_a_constant_has_a_scale(tmp_path: Path) -> None:
    assert load(tmp_path, x=np.zeros((12, 4)), y=LABELS).spec.scale == 1.0


def test_four_arrays_are_two_splits(tmp_path: Path) -> None:
    x = np.arange(48, dtype=np.float32).reshape(12, 4)
    data = load(tmp_path, x_train=x, y_train=LABELS, x_test=x[:5] + 1, y_test=LABELS[:5].astype(np.uint8))
    assert data.train is not None
    assert (len(data.train), len(data.test)) == (12, 5)
    assert data.train.spec == data.test.spec == data.spec
    assert float(data.test.all()[0][0, 0]) == 1.0


def test_classes_may_be_told(tmp_path: Path) -> None:
    np.savez(tmp_path / "d.npz", x=np.zeros((12, 4)), y=LABELS)
    assert load_data(str(tmp_path / "d.npz"), n_classes=7).spec.n_classes == 7
    with pytest.raises(DataError, match="beyond the model's classes"):
        load_data(str(tmp_path / "d.npz"), n_classes=2)


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"images": np.zeros((3, 4)), "y": np.zeros(3, int)}, "lacks its arrays"),
        ({"x": np.zeros((3, 4))}, "lacks its arrays"),
        ({"x": np.zeros((3, 4)), "y": np.zeros(2, int)}, "as many inputs as labels"),
        ({"x": np.zeros((0, 4)), "y": np.zeros(0, int)}, "as many inputs as labels"),
        ({"x": np.zeros(3), "y": np.zeros(3, int)}, "as many inputs as labels"),
        ({"x": np.zeros((3, 4)), "y": np.zeros((3, 2), int)}, "integer labels"),
        ({"x": np.zeros((3, 4)), "y": np.zeros(3)}, "integer labels"),
        ({"x": np.full((3, 4), "a"), "y": np.zeros(3, int)}, "wrong type"),
        ({"x": np.full((3, 4), 1j), "y": np.zeros(3, int)}, "wrong type"),
        ({"x": np.full((3, 4), np.nan), "y": np.zeros(3, int)}, "NaN or infinity"),
        ({"x": np.full((3, 4), -np.inf), "y": np.zeros(3, int)}, "NaN or infinity"),
        ({"x": np.full((3, 4), 1e300), "y": np.zeros(3, int)}, "NaN or infinity"),
        ({"x": np.zeros((3, 4)), "y": np.asarray([0, 1, -1])}, "must not be negative"),
        (
            {
                "x_train": np.zeros((3, 4)),
                "y_train": np.zeros(3, int),
                "x_test": np.zeros((3, 5)),
                "y_test": np.zeros(3, int),
            },
            "the splits differ",
        ),
        ({"x": np.asarray([{}, {}], dtype=object), "y": np.zeros(2, int)}, "can't be read"),
    ],
)
def test_bad_arrays_are_refused(tmp_path: Path, arrays: dict[str, Any], words: str) -> None:
    with pytest.raises(DataError, match=words):
        load(tmp_path, **arrays)


def test_bad_files_are_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "good.npz", x=np.zeros((3, 4)), y=np.zeros(3, int))
    whole = (tmp_path / "good.npz").read_bytes()
    single = io.BytesIO()
    np.save(single, np.zeros(3))
    for content in (b"", b"text", whole[:60], whole[:-40], single.getvalue(), b"\x80\x04N."):
        (tmp_path / "bad.npz").write_bytes(content)
        with pytest.raises(DataError, match=r"bad\.npz"):
            load_data(str(tmp_path / "bad.npz"))
    with pytest.raises(DataError):
        load_data(str(tmp_path / "none.npz"))
    for source in ("no-such-thing", str(tmp_path / "data.csv")):
        with pytest.raises(DataError, match="can't be read"):
            load_data(source)


FACTORIES = """
import torch

def good():
    rows = [(torch.full((1, 4, 4), i / 10), i % 3) for i in range(10)]
    return rows[:6], rows[6:]

def single():
    return [1, 2, 3]

def empty():
    return [], []

def ragged():
    return [(torch.zeros(3), 0), (torch.zeros(4), 1)], [(torch.zeros(3), 0)]

def nameless():
    return [(torch.zeros(3), "cat")], [(torch.zeros(3), "dog")]

def endless():
    return iter(()), iter(())

def broken():
    raise RuntimeError("the disk is gone")
"""


@pytest.fixture
def factories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "my_factories.py").write_text(FACTORIES)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "my_factories", raising=False)
    return "my_factories"


def test_a_factory_of_two_data_sets(factories: str) -> None:
    data = load_data(f"{factories}:good")
    assert data.train is not None
    assert (len(data.train), len(data.test), data.spec.input_shape) == (6, 4, (1, 4, 4))
    assert data.test.all()[1].tolist() == [0, 1, 2, 0]


@pytest.mark.parametrize("name", ["single", "empty", "ragged", "nameless", "endless", "broken"])
def test_bad_factories_are_refused(factories: str, name: str) -> None:
    with pytest.raises(DataError, match=f"{factories}:{name}"):
        load_data(f"{factories}:{name}")


def test_missing_factories_are_refused(factories: str) -> None:
    for source in (f"{factories}:nothing", "no_such_module:f"):
        with pytest.raises(UsageError):
            load_data(source)


def test_a_datasets_folder(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    rows = {"x": np.arange(24.0).reshape(6, 4).tolist(), "label": [0, 1, 2, 0, 1, 2]}
    split = datasets.Dataset.from_dict(rows)
    datasets.DatasetDict({"train": split, "test": split}).save_to_disk(str(tmp_path / "set"))
    data = load_data(str(tmp_path / "set"))
    assert data.spec.input_shape == (4,)
    assert data.spec.n_classes == 3


def test_a_folder_that_holds_none(tmp_path: Path) -> None:
    with pytest.raises(DataError):
        load_data(str(tmp_path))


def test_other_dtypes_become_float32() -> None:
    for dtype in (torch.float64, torch.float16, torch.int64):
        assert to_float(torch.ones(2, 2, dtype=dtype)).dtype == torch.float32
