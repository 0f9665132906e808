"""Covariances of wrong classes' scores with features: a slow oracle, and what cannot move them."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from conformance import KEY, SPECS, network, pool, white
from gradmark.coarse import coarse, width_of
from gradmark.errors import UsageError
from gradmark.protocols import ModelSpec
from gradmark.schemes.feature_contrast import FeatureContrast
from gradmark.suspects import CallableSuspect

SCHEME = FeatureContrast(features=2, contrasts=3)


def values(model: nn.Module, domain: str, n: int = 10**6) -> Tensor:
    mark = SCHEME.mark(KEY, SPECS[domain])
    return SCHEME.read(mark, white(model), pool(domain), access="black", carriers=1, queries=n).values


@pytest.mark.parametrize("domain", list(SPECS))
def test_a_bit_is_a_covariance(domain: str) -> None:
    """Class by class, feature by feature, contrast by contrast, with loops."""
    model, mark = network(domain), SCHEME.mark(KEY, SPECS[domain])
    x, labels = pool(domain)
    with torch.no_grad():
        scores = model(x).double()
    view, expected = coarse(SPECS[domain], x).double(), []
    assert view.shape[1] == width_of(SPECS[domain])
    features = view @ mark.directions.double()
    centred = features.clone()
    for c in range(10):
        centred[labels == c] -= features[labels == c].mean(0)
    spread = centred.square().mean(0).sqrt()
    for c in range(10):
        mine = labels == c
        for j in range(2):
            for w in mark.contrasts[c].double():
                assert abs(float(w[c])) < 1e-6
                covariance = (centred[mine, j] / spread[j] * (scores[mine] @ w)).mean()
                expected.append(covariance if int(mine.sum()) > 1 else torch.zeros(()))
    torch.testing.assert_close(values(model, domain), torch.stack(expected).double(), atol=1e-5, rtol=1e-4)


def test_what_is_the_same_for_a_whole_class_moves_nothing() -> None:
    """So who gives each class's mean an ordinary look takes nothing of this mark."""
    model, (x, labels) = network("grey"), pool("grey")
    shift = torch.randn(10, 10, generator=torch.Generator().manual_seed(1))
    place = {bytes(row.numpy().tobytes()): int(label) for row, label in zip(x, labels, strict=True)}

    def moved(batch: Tensor) -> Tensor:
        with torch.no_grad():
            return model(batch) + shift[[place[bytes(row.numpy().tobytes())] for row in batch]]

    mark = SCHEME.mark(KEY, SPECS["grey"])
    found = SCHEME.read(mark, CallableSuspect(moved, name="api"), (x, labels), access="black", carriers=1,
                        queries=10**6).values  # fmt: skip
    torch.testing.assert_close(found, values(model, "grey"), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("domain", ["grey", "colour"])
def test_an_overall_view_by_loops(domain: str) -> None:
    """And a mirrored image looks the same, as networks that learn from mirrored images see it."""
    x, spec = pool(domain)[0][:20], SPECS[domain]
    channels = spec.input_shape[0]
    found = coarse(spec, x, "overall")
    assert found.shape == (20, channels + 5) and width_of(spec, "overall") == channels + 5
    torch.testing.assert_close(coarse(spec, x.flip(3), "overall"), found, atol=1e-5, rtol=1e-4)
    side = spec.input_shape[-1]
    for image, row in zip(x.double(), found.double(), strict=True):
        grey = image.mean(0)
        across = sum(float((grey[:, i + 1] - grey[:, i]).abs().mean()) for i in range(side - 1)) / (side - 1)
        down = sum(float((grey[i + 1] - grey[i]).abs().mean()) for i in range(side - 1)) / (side - 1)
        expected = [
            float(grey.mean()),
            *(2 * float(image[c + 1].mean() - image[c].mean()) for c in range(channels - 1)),
            0.4 * math.log(across + down),
            0.4 * math.log(across / down),
            0.4 * math.log(float(grey.std())),
            float(grey[: side // 2].mean() - grey[side // 2 :].mean()),
            float(grey[side // 4 : -side // 4, side // 4 : -side // 4].mean() - grey.mean()),
        ]
        torch.testing.assert_close(row, torch.tensor(expected).double(), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("domain", ["mono", "stereo"])
def test_an_overall_view_of_a_signal_by_loops(domain: str) -> None:
    x, spec = pool(domain)[0][:20], SPECS[domain]
    found = coarse(spec, x, "overall")
    assert found.shape == (20, 4) and width_of(spec, "overall") == 4
    for signal, row in zip(x.double().reshape(20, -1, 256), found.double(), strict=True):
        sizes = [float(signal[:, t].abs().mean()) for t in range(256)]
        centre = sum(s * t / 255 for t, s in enumerate(sizes)) / sum(sizes)
        spread = math.sqrt(sum(s * (t / 255 - centre) ** 2 for t, s in enumerate(sizes)) / sum(sizes))
        turns = [float(c[t].sign() != c[t + 1].sign()) for c in signal for t in range(255)]
        loud = math.log(float(signal.square().mean()))
        expected = [0.3 * loud, 8 * centre, 25 * spread, 10 * sum(turns) / len(turns)]
        torch.testing.assert_close(row, torch.tensor(expected).double(), atol=1e-4, rtol=1e-4)
    silent = coarse(spec, torch.zeros(2, *spec.input_shape), "overall")
    assert bool(torch.isfinite(silent).all())


def test_a_flat_image_has_an_overall_view() -> None:
    flat = coarse(SPECS["colour"], torch.full((2, 3, 16, 16), 0.5), "overall")
    assert bool(torch.isfinite(flat).all())
    assert bool(
        torch.isfinite(coarse(ModelSpec("image", (1, 3, 3), 10), torch.rand(2, 1, 3, 3), "overall")).all()
    )


@pytest.mark.parametrize(("features", "groups"), [(1, 10), (8, 1), (2, 0), (3, 4)])
def test_overall_bits_are_covariances_within_classes_too(features: int, groups: int) -> None:
    scheme = FeatureContrast(features=features, contrasts=3, view="overall", groups=groups)
    model, spec, (x, labels) = network("colour"), SPECS["colour"], pool("colour")
    mark = scheme.mark(KEY, spec)
    groups = groups or 1
    assert len(mark.bits) == groups * features * 3
    torch.testing.assert_close(mark.directions.T @ mark.directions, torch.eye(features), atol=1e-5, rtol=0)
    seen = coarse(spec, x, "overall").double() @ mark.directions.double()
    with torch.no_grad():
        scores = model(x).double()
    for c in range(10):
        seen[labels == c] -= seen[labels == c].mean(0)
    seen = seen / seen.square().mean(0).sqrt()
    expected = []
    for g in range(groups):
        mine = [i for i, label in enumerate(labels.tolist()) if label % groups == g]
        for j in range(features):
            for number in range(3):
                shares = [float(seen[i, j] * (mark.contrasts[int(labels[i]), number].double() @ scores[i]))
                          for i in mine]  # fmt: skip
                expected.append(sum(shares) / len(shares))
    found = scheme.read(mark, white(model), (x, labels), access="black", carriers=1, queries=10**6).values
    torch.testing.assert_close(found, torch.tensor(expected).double(), atol=1e-5, rtol=1e-4)
    (questions,) = scheme.questions(mark, (x, labels), 10)
    assert sum(questions.rooms) == len(x) and len(questions.rooms) == groups
    means = []
    for cell, room in enumerate(questions.rooms):
        with torch.no_grad():
            told = torch.stack([model(questions.ask(cell, k)) for k in range(room)]).double()
        means.append(questions.read(told, torch.full((room,), cell), torch.arange(room)).mean(0))
    torch.testing.assert_close(torch.cat(means), found, atol=1e-5, rtol=1e-4)


def test_the_first_view_keeps_its_bytes_and_another_has_bits_of_its_own() -> None:
    assert not {"view", "groups"} & set(FeatureContrast().parameters())
    assert FeatureContrast(view="overall").parameters()["view"] == "overall"
    cells, overall = (FeatureContrast(view=v).mark(KEY, SPECS["colour"]) for v in ("cells", "overall"))
    assert not torch.equal(cells.bits, overall.bits)


def test_one_input_has_no_covariance() -> None:
    mark = SCHEME.mark(KEY, SPECS["grey"])
    x, labels = pool("grey")
    few = torch.cat(
        [torch.nonzero(labels == c)[:1, 0] for c in range(9)] + [torch.nonzero(labels == 9)[:5, 0]]
    )
    reading = SCHEME.read(mark, white(network("grey")), (x[few], labels[few]), access="white", carriers=100)
    assert bool((reading.values[: 9 * 6] == 0).all())
    assert bool((reading.values[9 * 6 :] != 0).all())


def test_step_by_step_asks_for_the_same_numbers() -> None:
    """The mean over all of a cell's observations is the reading of the whole pool."""
    model, (x, labels) = network("grey"), pool("grey")
    mark = SCHEME.mark(KEY, SPECS["grey"])
    (questions,) = SCHEME.questions(mark, (x, labels), 10)
    means = []
    for cell, room in enumerate(questions.rooms):
        numbers = torch.arange(room)
        asked = torch.stack([questions.ask(cell, k) for k in range(room)])
        with torch.no_grad():
            scores = torch.stack([model(one) for one in asked]).double()
        means.append(questions.read(scores, torch.full((room,), cell), numbers).mean(0))
    torch.testing.assert_close(torch.cat(means), values(model, "grey"), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("spec", "scheme"),
    [
        (ModelSpec("image", (1, 8, 8), 3), FeatureContrast()),
        (ModelSpec("tokens", (16,), 10, levels=50), FeatureContrast()),
        (ModelSpec("vector", (4,), 10), FeatureContrast(features=4)),
        (ModelSpec("image", (1, 8, 8), 10), FeatureContrast(features=0)),
        (ModelSpec("image", (3, 8, 8), 10), FeatureContrast(groups=-1)),
        (ModelSpec("image", (3, 8, 8), 10), FeatureContrast(features=9, view="overall")),
    ],
)
def test_where_there_is_no_room_it_says_so(spec: ModelSpec, scheme: FeatureContrast) -> None:
    with pytest.raises(UsageError, match="can't carry"):
        scheme.mark(KEY, spec)
    assert FeatureContrast().fits(ModelSpec("signal", (8000,), 10))
    assert not FeatureContrast().fits(ModelSpec("tokens", (16,), 10, levels=50))


def test_an_unknown_view_is_named() -> None:
    with pytest.raises(UsageError, match="No such view") as told:
        FeatureContrast(view="sideways").mark(KEY, SPECS["grey"])
    assert "cells or overall" in str(told.value)
