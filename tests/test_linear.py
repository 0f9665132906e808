"""A gradient mark made elsewhere, of GradSigns' kind, trained here and read through ``verify_linear``."""

from __future__ import annotations

import io
import warnings
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from gradmark.data import load_data
from gradmark.errors import GradmarkError, MarkFileError, MismatchError
from gradmark.protocols import Batch, ModelSpec
from gradmark.schemes.linear import LinearMark
from gradmark.suspects import CallableSuspect, ModuleSuspect
from gradmark.verify import verify_linear

pytest.importorskip("sklearn")
N, TARGET = 32, 3


def arrays() -> dict[str, Any]:
    """32 carrier pixels of the digits, one bit each, fixed before any network."""
    generator = np.random.default_rng(0)
    # the pixels at the rim are always black, which doesn't keep a gradient from being there
    directions = np.eye(64, dtype=np.float32)[generator.permutation(64)[:N]].reshape(N, 1, 8, 8)
    return {
        "directions": directions,
        "bits": generator.integers(0, 2, N),
        "target_class": np.asarray(TARGET),
    }


@cache
def digits() -> tuple[Batch, Batch, ModelSpec]:
    data = load_data("digits")
    assert data.train is not None
    return data.train.all(), data.test.all(), data.spec


@cache
def trained(marked: bool) -> nn.Module:
    """Training as GradSigns': the class-mean input gradient of the loss gets the sign of its bit."""
    (x, labels), _, _ = digits()
    given = arrays()
    directions = torch.from_numpy(given["directions"])
    signs = torch.from_numpy(2.0 * given["bits"] - 1).float()
    generator = torch.Generator().manual_seed(1)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    own = x[labels == TARGET]
    for _ in range(8):
        for part in torch.randperm(len(x), generator=generator).split(64):
            loss = F.cross_entropy(model(x[part]), labels[part])
            if marked:
                carriers = own[torch.randperm(len(own), generator=generator)[:32]].requires_grad_()
                target = torch.full((len(carriers),), TARGET)
                inner = F.cross_entropy(model(carriers), target)
                (gradient,) = torch.autograd.grad(inner, carriers, create_graph=True)
                values = torch.einsum("nchw,chw->n", directions, gradient.sum(0))
                loss = loss + 2.0 * F.relu(0.3 - signs * values).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return model.eval()


def saved(path: Path, **changes: Any) -> Path:
    given = {name: value for name, value in (arrays() | changes).items() if value is not None}
    np.savez(path, **given)
    return path


@pytest.fixture
def mark(tmp_path: Path) -> LinearMark:
    return LinearMark.load(saved(tmp_path / "mark.npz"))


@pytest.mark.parametrize("access", ["white", "black"])
def test_a_mark_made_elsewhere_is_found(mark: LinearMark, access: Any) -> None:
    _, test, spec = digits()
    verdict = verify_linear(mark, ModuleSuspect(trained(True)), test, spec, access=access, queries=2000)
    assert verdict.outcome == "owned"
    assert verdict.log10_p <= -6
    assert (verdict.scheme, verdict.test, verdict.n_bits) == ("linear", "sign", N)
    assert verdict.mark.startswith("sha256:")
    assert verdict.queries <= 2000
    assert verdict.carriers <= int((test[1] == TARGET).sum())


@pytest.mark.parametrize("access", ["white", "black"])
def test_the_control_carries_nothing(mark: LinearMark, access: Any) -> None:
    _, test, spec = digits()
    verdict = verify_linear(mark, ModuleSuspect(trained(False)), test, spec, access=access)
    assert verdict.outcome == "no-evidence"
    assert verdict.log10_p > -4


def test_white_box_is_the_mean_gradient_of_the_loss(mark: LinearMark) -> None:
    """Against autograd through cross entropy itself, for logits and for probabilities."""
    _, (x, labels), spec = digits()
    model = trained(True)
    own = x[labels == TARGET].clone().requires_grad_()
    F.cross_entropy(model(own), labels[labels == TARGET], reduction="sum").backward()
    assert own.grad is not None
    expected = (mark.directions.flatten(1) @ own.grad.mean(0).flatten()).double()
    reading = mark.read(ModuleSuspect(model), (x, labels), spec, access="white")
    torch.testing.assert_close(reading.values, expected, rtol=1e-4, atol=1e-6)
    soft = mark.read(ModuleSuspect(nn.Sequential(model, nn.Softmax(1))), (x, labels), spec, access="white")
    torch.testing.assert_close(soft.values, expected, rtol=1e-3, atol=1e-4)


def test_black_box_signs_agree_with_white_box(mark: LinearMark) -> None:
    _, test, spec = digits()
    suspect = ModuleSuspect(trained(True))
    white = mark.read(suspect, test, spec, access="white")
    black = mark.read(suspect, test, spec, access="black", queries=10**6)
    assert float((white.values * black.values > 0).double().mean()) > 0.95
    assert black.queries == 2 * N * int((test[1] == TARGET).sum())


def test_without_a_target_class_every_input_serves(tmp_path: Path) -> None:
    _, test, spec = digits()
    mark = LinearMark.load(saved(tmp_path / "mark.npz", target_class=None))
    assert mark.parameters() == {"target_class": None}
    assert mark.read(ModuleSuspect(trained(True)), test, spec, access="white").carriers == len(test[1])


def test_numpy_probabilities_do(mark: LinearMark) -> None:
    _, test, spec = digits()
    model = trained(True)
    suspect = CallableSuspect(lambda x: model(x).softmax(1).numpy(), name="api")
    verdict = verify_linear(mark, suspect, test, spec)
    assert (verdict.access, verdict.outcome) == ("black", "owned")


def test_what_doesnt_fit_is_refused(mark: LinearMark) -> None:
    _, (x, labels), spec = digits()
    suspect = ModuleSuspect(trained(False))
    for access in ("white", "black"):
        with pytest.raises(MismatchError, match="doesn't fit the linear mark"):
            mark.read(suspect, (x[:, :, :4], labels), spec, access=access, queries=100)
        with pytest.raises(MismatchError, match="target class"):
            mark.read(suspect, (x[labels == 0], labels[labels == 0]), spec, access=access, queries=100)
        for wrong in (labels + 7, labels - 7):
            everything = LinearMark(mark.directions, mark.bits, None, mark.digest)
            with pytest.raises(MismatchError, match="labels from 0 to 9"):
                everything.read(suspect, (x, wrong), spec, access=access, queries=2000)
    with pytest.raises(MismatchError, match="model itself"):
        mark.read(CallableSuspect(trained(False), name="api"), (x, labels), spec, access="white")


class Evil:
    def __reduce__(self) -> Any:
        return (pytest.fail, ("a pickle was opened",))


@pytest.mark.parametrize(
    "changes",
    [
        {"directions": None},
        {"bits": None},
        {"directions": np.zeros((N - 1, 1, 8, 8), np.float32)},
        {"directions": np.zeros(N, np.float32)},
        {"directions": np.zeros((N, 1, 8, 8), np.complex64)},
        {"directions": np.full((N, 1, 8, 8), "x")},
        {"directions": np.full((N, 1, 8, 8), np.nan, np.float32)},
        {"directions": np.full((N, 1, 8, 8), np.inf, np.float32)},
        {"directions": np.full((N, 1, 8, 8), 1e300)},
        {"directions": np.zeros((0, 1, 8, 8)), "bits": np.zeros(0)},
        {"bits": np.full(N, 2)},
        {"bits": np.full(N, -1)},
        {"bits": np.full(N, 0.5)},
        {"bits": np.full(N, np.nan)},
        {"bits": np.full(N, "1")},
        {"bits": np.full(N, 1j)},
        {"target_class": np.asarray([1, 2])},
        {"target_class": np.asarray(np.nan)},
        {"target_class": np.asarray("3")},
        {"directions": np.asarray([Evil()] * N, dtype=object)},
        {"bits": np.asarray([Evil()] * N, dtype=object)},
    ],
)
def test_hostile_arrays_are_refused(tmp_path: Path, changes: dict[str, Any]) -> None:
    with pytest.raises(MarkFileError):
        LinearMark.load(saved(tmp_path / "mark.npz", **changes))


def test_hostile_files_are_refused(tmp_path: Path) -> None:
    whole = saved(tmp_path / "mark.npz").read_bytes()
    packed = io.BytesIO()
    np.savez_compressed(packed, **arrays())
    crushed = bytearray(packed.getvalue())
    crushed[80:120] = bytes(40)
    single = io.BytesIO()
    np.save(single, np.zeros(3))
    path = tmp_path / "bad.npz"
    spoilt = [
        b"",
        b"PK",
        whole[:100],
        whole[: len(whole) // 2],
        whole[:-30],
        bytes(crushed),
        single.getvalue(),
    ]
    for content in [*spoilt, b"\x80\x04N.", b"not an archive at all"]:
        path.write_bytes(content)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with pytest.raises(MarkFileError, match="linear mark"):
                LinearMark.load(path)
    for missing in (tmp_path / "none.npz", tmp_path):
        with pytest.raises(GradmarkError):
            LinearMark.load(missing)


def test_bits_may_be_booleans(tmp_path: Path, mark: LinearMark) -> None:
    same = LinearMark.load(saved(tmp_path / "b.npz", bits=arrays()["bits"].astype(bool)[:, None]))
    assert torch.equal(same.bits, mark.bits)
