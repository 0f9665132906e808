"""Data as the command line takes it: ``digits``, an ``.npz``, a `datasets` folder, ``MODULE:FACTORY``."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gradmark.errors import DataError, GradmarkError
from gradmark.files import read_arrays
from gradmark.protocols import Batch, Domain, ModelSpec
from gradmark.suspects import load_factory

_CONVERT = "save uint8 images, int16 audio or floats, with integer labels, by numpy.savez"


@dataclass(frozen=True)
class Split:
    """Inputs as stored (uint8 or int16 stay so, to save memory) and labels (n,) int64."""

    x: Tensor
    y: Tensor
    spec: ModelSpec

    def __len__(self) -> int:
        return len(self.y)

    def batch(self, index: Tensor | slice) -> Batch:
        """Inputs (b, *shape) float32 in the model's range, and labels (b,)."""
        return to_float(self.x[index]), self.y[index]

    def all(self) -> Batch:
        """Every input and label, as :meth:`batch`."""
        return self.batch(slice(None))


@dataclass(frozen=True)
class Data:
    """A training split (None where only one was given) and the split that nothing is trained on."""

    train: Split | None
    test: Split
    spec: ModelSpec

    def to_train(self) -> Split:
        """The training split. DataError where there is none."""
        if self.train is None:
            wanted = "x_train, y_train, x_test, y_test"
            raise DataError("There are no inputs to train on", expected=wanted, found="x, y alone")
        return self.train


def to_float(x: Tensor) -> Tensor:
    """uint8 -> [0, 1], int16 -> [-1, 1), floats as they are; float32."""
    if x.dtype == torch.uint8:
        return x.float() / 255
    if x.dtype == torch.int16:
        return x.float() / 32768
    return x.float()


def load_data(source: str, *, n_classes: int | None = None) -> Data:
    """Read ``source``. Raises DataError where it can't be read or makes no sense."""
    if source == "digits":
        return _digits()
    if source.endswith(".npz"):
        return _from_arrays(_read_npz(Path(source)), source, n_classes)
    if Path(source).is_dir():
        return _from_arrays(_read_folder(Path(source)), source, n_classes)
    if ":" in source:
        return _from_factory(source, n_classes)
    raise DataError(
        "The data can't be read",
        expected="'digits', an .npz file, a Hugging Face datasets folder, or MODULE:FACTORY",
        found=source,
    )


def _digits() -> Data:
    """scikit-learn's 8x8 digits, in its own order: the first 1197 to train, the last 600 to test."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as cause:
        raise DataError("The digits need scikit-learn", fix="pip install 'gradmark[demo]'") from cause
    bunch = load_digits()
    x = (bunch.images / 16).astype(np.float32)
    arrays = {
        "x_train": x[:1197],
        "y_train": bunch.target[:1197],
        "x_test": x[1197:],
        "y_test": bunch.target[1197:],
    }
    return _from_arrays(arrays, "digits", None)


def _read_npz(path: Path) -> dict[str, Any]:
    arrays = read_arrays(path, what=f"data file {path.name}", error=DataError)
    return {name: array for name, array in arrays.items() if name in _NAMES}


_LARGEST = 1e30  # a float32 holds no more than 3e38, and a network computes with it
_NAMES = ("x_train", "y_train", "x_test", "y_test", "x", "y")


def _read_folder(path: Path) -> dict[str, Any]:
    try:
        import datasets
    except ImportError as cause:
        raise DataError(
            "A datasets folder needs Hugging Face datasets", fix="pip install datasets"
        ) from cause
    try:
        loaded = datasets.load_from_disk(str(path))
        splits = loaded if isinstance(loaded, dict) else {"": loaded}
        arrays = {}
        for name, split in splits.items():
            columns = split.column_names
            xs = next(c for c in ("x", "image", "img", "audio", "input") if c in columns)
            ys = next(c for c in ("y", "label", "labels", "target") if c in columns)
            suffix = {"": "", "train": "_train"}.get(name, "_test")
            arrays["x" + suffix] = np.stack([_row(v) for v in split[xs]])
            arrays["y" + suffix] = np.asarray(split[ys])
    except (FileNotFoundError, StopIteration, ValueError, TypeError) as cause:
        raise DataError(
            f"{path.name} is no usable datasets folder", found=str(cause), expected="columns x and y"
        ) from cause
    return arrays


def _row(value: Any) -> Any:
    return value["array"] if isinstance(value, dict) and "array" in value else np.asarray(value)


def _from_factory(source: str, n_classes: int | None) -> Data:
    factory = load_factory(source)
    try:
        pair = factory()
    except GradmarkError:
        raise
    except Exception as cause:  # a user's function may fail in any way
        raise DataError(
            f"{source} fails without arguments", found=f"{type(cause).__name__}: {cause}"
        ) from cause
    if not isinstance(pair, (tuple, list)) or len(pair) != 2:
        raise DataError(
            f"{source} returned no pair of datasets", expected="(train, test)", found=type(pair).__name__
        )
    arrays = {}
    for name, dataset in zip(("train", "test"), pair, strict=True):
        try:
            rows = [dataset[i] for i in range(len(dataset))]
            arrays[f"x_{name}"] = np.stack([np.asarray(x) for x, _ in rows])
            arrays[f"y_{name}"] = np.asarray([int(y) for _, y in rows])
        except Exception as cause:  # a user's data set may fail in any way
            raise DataError(
                f"The {name} set of {source} can't be read",
                expected="(input, integer label) pairs of one shape",
                found=f"{type(cause).__name__}: {cause}",
            ) from cause
    return _from_arrays(arrays, source, n_classes)


def _from_arrays(arrays: dict[str, Any], source: str, n_classes: int | None) -> Data:
    pairs = [
        (a, b)
        for a, b in (("x_train", "y_train"), ("x_test", "y_test"), ("x", "y"))
        if a in arrays and b in arrays
    ]
    if not pairs:
        raise DataError(
            f"{source} lacks its arrays",
            expected="x and y, or x_train, y_train, x_test, y_test",
            found=", ".join(arrays) or "none of them",
        )
    for a, b in pairs:
        _check(arrays[a], arrays[b], f"{source}: {a}, {b}")
    highest = int(max(arrays[b].max() for _, b in pairs))
    classes = highest + 1 if n_classes is None else n_classes
    if highest >= classes:
        raise DataError(
            f"{source}: labels beyond the model's classes", expected=f"0 to {classes - 1}", found=str(highest)
        )
    a, b = pairs[0]
    spec = _infer_spec(arrays[a], max(classes, 2))
    splits = [
        Split(_to_tensor(arrays[a], spec), torch.from_numpy(np.asarray(arrays[b]).astype(np.int64)), spec)
        for a, b in pairs
    ]
    for split in splits:
        if split.x.shape[1:] != spec.input_shape:
            raise DataError(
                f"{source}: the splits differ",
                expected=f"inputs {spec.input_shape}",
                found=str(tuple(split.x.shape[1:])),
            )
    return Data(splits[0] if len(splits) > 1 else None, splits[-1], spec)


def _check(x: Any, y: Any, what: str) -> None:
    if x.dtype.kind not in "uif" or y.dtype.kind not in "ui" or y.ndim != 1:
        raise DataError(
            f"{what} have a wrong type",
            expected="numbers, and integer labels (n,)",
            found=f"{x.dtype}, {y.dtype} {y.shape}",
            fix=_CONVERT,
        )
    if x.ndim < 2 or len(x) != len(y) or len(x) == 0:
        raise DataError(
            f"{what} don't fit each other", expected="as many inputs as labels", found=f"{x.shape}, {y.shape}"
        )
    if x.dtype.kind == "f" and not (np.abs(x) < _LARGEST).all():
        raise DataError(f"{what} hold NaN or infinity", expected="finite numbers")
    if int(y.min()) < 0:
        raise DataError(f"{what}: labels must not be negative", found=str(int(y.min())))


def _infer_spec(x: Any, n_classes: int) -> ModelSpec:
    shape = _channels_first(x).shape[1:]
    if x.dtype == np.uint8 and len(shape) == 3:
        return ModelSpec("image", shape, n_classes, 0.0, 1.0, 255)
    if x.dtype == np.int16:
        return ModelSpec("signal", shape, n_classes, -1.0, 32767 / 32768, 65535)
    domain: Domain = "image" if len(shape) == 3 else "signal" if len(shape) == 2 else "vector"
    low, high = float(x.min()), float(x.max())
    if domain != "vector" and low >= 0 and high <= 1:
        return ModelSpec(domain, shape, n_classes, 0.0, 1.0)
    return ModelSpec(domain, shape, n_classes, scale=round(float(x.std()), 3) or 1.0)


def _channels_first(x: Any) -> Any:
    """Images as (n, channels, height, width): NHW gets a channel, NHWC is turned."""
    if x.dtype == np.int16 or x.ndim == 2:
        return x
    if x.ndim == 3:
        return x[:, None]
    return (
        np.moveaxis(x, 3, 1) if x.ndim == 4 and x.shape[3] in (1, 3, 4) and x.shape[1] not in (1, 3, 4) else x
    )


def _to_tensor(x: Any, spec: ModelSpec) -> Tensor:
    x = np.ascontiguousarray(_channels_first(x))
    if x.dtype in (np.uint8, np.int16) and spec.low is not None:
        return torch.from_numpy(x)
    return torch.from_numpy(x.astype(np.float32))


def shared(name: str) -> Path:
    """A file of data that isn't ours to ship: in GRADMARK_SHARED, or ``shared`` here or above.

    DataError where it isn't there.
    """
    given = os.environ.get("GRADMARK_SHARED")
    here = Path.cwd()
    places = [Path(given)] if given else [folder / "shared" for folder in (here, *here.parents)]
    for place in places:
        if (place / "data" / name).exists():
            return place / "data" / name
    raise DataError(
        f"The task's data are missing: {name}",
        expected="shared/data in or above the current folder",
        fix="Set GRADMARK_SHARED to the folder that holds data/" + name,
    )
