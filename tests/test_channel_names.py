"""Channels told by what they do: profiles, their bytes, and the assignment against a slow oracle."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from conformance import KEY, pool
from gradmark.bench.networks import Block, DigitsNet
from gradmark.channel_names import Profile, aligned, pack, profiles, recognised, unpack
from gradmark.errors import MarkFileError
from gradmark.keys import OwnerKey
from gradmark.layer_chains import layer_chains

X = pool("grey")[0]


def residual(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 6, 3), nn.ReLU(), Block(6, 6, 1), Block(6, 8, 2), nn.Flatten(), nn.Linear(72, 10)
    ).eval()


def of(model: nn.Module, key: OwnerKey = KEY, x: Tensor = X) -> list[Profile | None]:
    return profiles(key, model, layer_chains(model, X), x, b"context")


def made(n: int, points: int, seed: int) -> Profile:
    torch.manual_seed(seed)
    values = torch.randn(n, points, dtype=torch.float64)
    values = values - values.mean(1, keepdim=True)
    return Profile(values / values.square().mean(1).sqrt()[:, None], torch.rand(n, dtype=torch.float64) + 0.1)


def test_ends_with_names_have_no_profile() -> None:
    """Pixels and classes; not so the channels of a stream."""
    assert of(DigitsNet().eval()) == [None, None]
    found = of(residual())
    assert [None if p is None else len(p.size) for p in found] == [6, 6, 6, 8]


def test_a_profile_is_of_unit_size_and_the_pools_order_is_nothing() -> None:
    first = of(residual())
    other = of(residual(), x=X[torch.randperm(len(X), generator=torch.Generator().manual_seed(1))])
    for a, b in zip(first, other, strict=True):
        assert a is not None
        assert b is not None
        alive = a.size > 0
        torch.testing.assert_close(a.values, b.values)
        torch.testing.assert_close(
            a.values.square().mean(1), alive.double(), msg="of unit mean square, or still"
        )


def test_another_key_looks_elsewhere() -> None:
    a, b = of(residual())[0], of(residual(), OwnerKey.from_seed(5))[0]
    assert a is not None
    assert b is not None
    assert not torch.allclose(a.values, b.values, atol=0.1)


@settings(deadline=None, max_examples=30)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=6), st.integers(0, 1000))
def test_bytes_keep_profiles(sizes: list[int], seed: int) -> None:
    found = [made(n, 256, seed + i) if n else None for i, n in enumerate(sizes)]
    data = pack(found)
    if not any(sizes):
        assert data == b""
        return
    for before, after in zip(found, unpack(data, len(sizes)), strict=True):
        assert (before is None) == (after is None)
        if before is not None and after is not None:
            torch.testing.assert_close(after.size, before.size, rtol=1e-6, atol=0)
            torch.testing.assert_close(after.values, before.values.clamp(-4, 4), rtol=0, atol=0.016)


def test_many_channels_are_profiled_at_fewer_points_and_too_many_not_at_all() -> None:
    data = pack([made(2000, 256, 0)])
    assert len(data) < 320_000
    (back,) = unpack(data, 1)
    assert back is not None
    assert back.values.shape == (2000, 150)
    assert pack([made(5000, 256, 0)]) == b""


@pytest.mark.parametrize(
    "change", [lambda d: d[:-1], lambda d: d + b"x", lambda d: d[:1], lambda d: b"\xff" * 40]
)
def test_hostile_bytes_are_refused(change: Any) -> None:
    data = pack([made(3, 256, 0), None])
    with pytest.raises(MarkFileError, match="don't fit its chains"):
        unpack(change(data), 2)


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 6), st.integers(0, 10**6), st.floats(0.0, 2.0))
def test_the_assignment_is_the_best_of_all(n: int, seed: int, noise: float) -> None:
    """Slow oracle: every order by itself. Inputs and outputs are put in it, and on the known scale."""
    known = made(n, 256, seed)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    other = made(n, 256, seed + 1)
    seen = Profile(known.values[order] + noise * other.values, other.size)
    w = torch.randn(n, n, 3, dtype=torch.float64)
    likeness = known.values @ seen.values.T
    best = max(
        itertools.permutations(range(n)),
        key=lambda way: sum(float(likeness[i, j]) for i, j in enumerate(way)),
    )
    index, scale = torch.tensor(best), seen.size[torch.tensor(best)] / known.size
    ((inputs, _),) = aligned([(w, None)], known, seen, None, None)
    torch.testing.assert_close(inputs, w[:, index] * scale[:, None])
    ((outputs, factor),) = aligned([(w, torch.arange(n))], None, None, known, seen)
    torch.testing.assert_close(outputs, w[index] / scale[:, None, None])
    assert factor is not None
    assert factor.tolist() == index.tolist()


def test_a_wider_stream_and_channels_in_copies_are_read_as_before() -> None:
    """Four channels; one of them now in three copies, whose outgoing weights add up to what they were."""
    known = made(4, 256, 0)
    w = torch.randn(3, 4, 2, dtype=torch.float64)
    copies = torch.tensor([2.0, 0.5, 1.0], dtype=torch.float64)
    parts = torch.randn(2, 3, 2, dtype=torch.float64) * 50
    last = w[:, 1] - copies[0] * parts[0] - copies[1] * parts[1]
    wide = torch.stack([w[:, 3], parts[0], w[:, 0], parts[1], torch.randn(3, 2).double(), last, w[:, 2]], 1)
    more = made(1, 256, 7)
    rows = torch.cat([known.values[[3, 1, 0, 1]], more.values, known.values[[1, 2]]])
    one, own = torch.ones(1, dtype=torch.float64), known.size
    size = torch.cat([own[3:], own[1:2] * 2, own[:1], own[1:2] / 2, one, own[1:2], own[2:3]])
    ((inputs, _),) = aligned([(wide, None)], known, Profile(rows, size), None, None)
    torch.testing.assert_close(inputs, w)
    ((outputs, _),) = aligned([(wide.movedim(1, 0), None)], None, None, known, Profile(rows, size))
    assert outputs.shape == (4, 3, 2)
    ((fewer, _),) = aligned([(w[:, :2], None)], known, Profile(known.values[:2], known.size[:2]), None, None)
    torch.testing.assert_close(fewer[:, :2], w[:, :2])
    assert not fewer[:, 2:].any()


def test_still_channels_count_for_nothing() -> None:
    known = made(4, 256, 0)
    for a, b in (
        (known.size, torch.tensor([1.0, 0.0, 1.0, 1.0])),
        (torch.tensor([1.0, 0.0, 1.0, 1.0]), known.size),
    ):
        pair = Profile(known.values, a.double()), Profile(known.values, b.double())
        w = torch.ones(2, 4, 1, dtype=torch.float64)
        ((inputs, _),) = aligned([(w, None)], *pair, None, None)
        ((outputs, _),) = aligned([(w.movedim(1, 0), None)], None, None, *pair)
        assert torch.isfinite(inputs).all()
        assert not inputs[:, 1].any()
        assert not outputs[1].any()
        assert inputs[:, 0].all()


def test_profiles_at_other_inputs_are_told_from_those_of_a_network_that_moved() -> None:
    known, other, noise = made(16, 256, 0), made(16, 256, 1), made(16, 256, 2)
    near = Profile(0.6 * known.values + 0.8 * noise.values, noise.size)
    assert recognised([known, None], [known, None])
    assert recognised([known], [Profile(near.values.flip(0), near.size)])
    assert not recognised([known, known], [other, noise])
    assert recognised([None], [None])
    still = Profile(known.values.clone().index_fill(0, torch.arange(8, 16), 0), known.size.clone())
    still.size[8:] = 0
    assert recognised([still], [still]), "channels that stand still tell nothing, and don't count"
