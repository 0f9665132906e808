"""GradSigns against a slow oracle; what a batch or a budget without carriers does."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from conformance import KEY, SPECS, Counting, inputs, network, pool, white
from gradmark.embed import Marker
from gradmark.errors import MismatchError, UsageError
from gradmark.schemes.gradsigns import GradSigns

SCHEME = GradSigns(bits=24, step=0.1)
SPEC = SPECS["grey"]


def test_white_box_reading_is_the_class_mean_gradient_of_cross_entropy() -> None:
    mark, model = SCHEME.mark(KEY, SPEC), network("grey", seed=5, activation=nn.Tanh)
    x, labels = pool("grey")
    x = x[labels == mark.target].clone().requires_grad_()
    F.cross_entropy(model(x), torch.full((len(x),), mark.target)).backward()
    assert x.grad is not None
    expected = mark.projection @ x.grad.flatten(1).sum(0)[mark.pixels]
    reading = SCHEME.read(mark, white(model), pool("grey"), access="white", carriers=10**6)
    assert reading.carriers == len(x)
    torch.testing.assert_close(reading.values.float(), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("budget", "spent", "images"), [(2, 2, 1), (64, 64, 1), (65, 65, 1), (66, 65, 1),
                                                         (67, 67, 2), (195, 195, 3)])  # fmt: skip
def test_a_budget_pays_for_whole_images_and_some_pixels_of_one_more(
    budget: int, spent: int, images: int
) -> None:
    suspect = Counting(network("grey"))
    reading = SCHEME.read(
        SCHEME.mark(KEY, SPEC), suspect, pool("grey"), access="black", carriers=9, queries=budget
    )
    assert (reading.queries, suspect.count, reading.carriers) == (spent, spent, images)


def test_a_batch_without_the_target_class_carries_no_penalty() -> None:
    marker, model = Marker(SCHEME, KEY, SPEC, every=1, carriers=100), network("grey")
    x, labels = inputs("grey", 100, seed=3)
    without = labels != marker.mark.target
    assert float(marker.penalty(model, (x[without], labels[without]))) == 0.0
    assert marker.method == "auto"
    assert float(marker.penalty(model, (x, labels)).detach()) > 0
    with pytest.raises(MismatchError, match="target class"):
        SCHEME.read(marker.mark, white(model), (x[without], labels[without]), access="white", carriers=9)


def test_impossible_settings_are_refused() -> None:
    for scheme in (GradSigns(bits=0), GradSigns(bits=129), GradSigns(step=0.0), GradSigns(pixels=0)):
        with pytest.raises(UsageError):
            scheme.mark(KEY, SPEC)
