"""Covariances of wrong classes' scores with features: a slow oracle, and what cannot move them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from conformance import KEY, SPECS, network, pool, white
from gradmark.errors import UsageError
from gradmark.protocols import ModelSpec
from gradmark.schemes.feature_contrast import FeatureContrast, coarse, width_of
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
    ],
)
def test_where_there_is_no_room_it_says_so(spec: ModelSpec, scheme: FeatureContrast) -> None:
    with pytest.raises(UsageError, match="can't carry"):
        scheme.mark(KEY, spec)
    assert FeatureContrast().fits(ModelSpec("signal", (8000,), 10))
    assert not FeatureContrast().fits(ModelSpec("tokens", (16,), 10, levels=50))
