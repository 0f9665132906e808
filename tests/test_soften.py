"""Carriers blurred and faded: what becomes of them, what is asked of a model, and what is left alone."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from conformance import KEY, SPECS, inputs, network
from gradmark.embed import Marker
from gradmark.embed.modes import penalty_mode
from gradmark.embed.soften import softened, unlikeness
from gradmark.errors import UsageError
from gradmark.schemes.class_contrast import ClassContrast
from gradmark.views import Classification, View

X, Y = inputs("grey", 256, seed=0)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def net() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return nn.Sequential(
            nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.2), nn.Flatten(),
            nn.Linear(8 * 64, 10),
        )  # fmt: skip


def marker(**more: Any) -> Marker:
    return Marker(ClassContrast(bits=40), KEY, SPECS["grey"], seed=5, **{"every": 1, **more})


def loop(model: nn.Module, mark: Marker, steps: range) -> list[float]:
    optimizer, found = torch.optim.SGD(model.parameters(), 0.05), []
    for step in steps:
        part = torch.randperm(len(X), generator=generator(step))[:64]
        penalty = mark.penalty(model, (X[part], Y[part]))
        optimizer.zero_grad()
        (F.cross_entropy(model(X[part]), Y[part]) + penalty).backward()
        optimizer.step()
        found.append(penalty.item())
    return found


@given(st.integers(1, 9), st.integers(1, 3), st.integers(1, 40), st.integers(1, 40), st.integers(0, 99))
def test_softened_images_lie_between_their_own_extremes(n: int, c: int, h: int, w: int, seed: int) -> None:
    x = torch.rand(n, c, h, w, generator=generator(seed))
    soft = softened(x, generator(seed))
    assert soft.shape == x.shape
    low, high = x.amin((1, 2, 3), keepdim=True), x.amax((1, 2, 3), keepdim=True)
    assert ((soft >= low - 1e-5) & (soft <= high + 1e-5)).all()
    assert torch.equal(soft, softened(x, generator(seed)))


def test_half_are_faded_towards_their_mean_and_half_are_blurred() -> None:
    x = torch.rand(400, 1, 16, 16, generator=generator(1))
    soft = softened(x, generator(2))
    away, before = (v - x.mean((1, 2, 3), keepdim=True) for v in (soft, x))
    share = (away * before).sum((1, 2, 3)) / before.square().sum((1, 2, 3))
    faded = (away - share.reshape(-1, 1, 1, 1) * before).abs().amax((1, 2, 3)) < 1e-5
    assert 150 < int(faded.sum()) < 250
    assert 0.1 <= share[faded].min() < 0.15
    assert 0.95 < share[faded].max() <= 1
    rough = (soft[..., 1:] - soft[..., :-1]).square().mean((1, 2, 3))
    assert (rough[~faded] < 0.5 * (x[..., 1:] - x[..., :-1]).square().mean((1, 2, 3))[~faded]).all()


def test_what_is_asked_is_the_answer_to_the_image_itself() -> None:
    """Against a pass of each, in a model without batch norms."""
    model = network("grey").eval()
    found = unlikeness(model, X[:20], generator(4))
    soft = softened(X[:20], generator(4))
    expected = -(model(X[:20]).softmax(1) * model(soft).log_softmax(1)).sum(1).mean()
    torch.testing.assert_close(found, expected)
    (gradient,) = torch.autograd.grad(found, [model[-1].weight])
    wanted = F.cross_entropy(model(soft), model(X[:20]).detach().softmax(1))
    torch.testing.assert_close(gradient, torch.autograd.grad(wanted, [model[-1].weight])[0])


def test_its_gradient_is_that_of_a_finite_difference() -> None:
    """Batch norms in training, whose statistics are those of the images themselves."""
    model, x = net().double().train(), X[:24].double()
    weights, at = list(model.parameters()), 1e-5
    with penalty_mode(model), torch.no_grad():
        wanted = model(x).softmax(1)

    def loss() -> Tensor:
        with penalty_mode(model):
            norm = model[1]
            h = model[0](torch.cat([x, softened(x, generator(7))]))
            var, mean = torch.var_mean(h[:24], (0, 2, 3), correction=0, keepdim=True)
            h = (h - mean) / (var + norm.eps).sqrt() * norm.weight.reshape(1, -1, 1, 1)
            return F.cross_entropy(model[2:](h + norm.bias.reshape(1, -1, 1, 1))[24:], wanted)

    found = unlikeness(model, x, generator(7))
    torch.testing.assert_close(found, loss())
    gradients = torch.autograd.grad(found, weights)
    way = [torch.randn(p.shape, generator=generator(8), dtype=p.dtype) for p in weights]
    ends = []
    for side in (at, -at):
        with torch.no_grad():
            for p, v in zip(weights, way, strict=True):
                p.add_(side * v)
            ends.append(loss().item())
            for p, v in zip(weights, way, strict=True):
                p.sub_(side * v)
    slope = sum(float((g * v).sum()) for g, v in zip(gradients, way, strict=True))
    assert slope == pytest.approx((ends[0] - ends[1]) / (2 * at), rel=1e-4)


@pytest.mark.parametrize("lean", [False, True])
def test_the_marker_adds_it_with_its_weight(lean: bool) -> None:
    """And leaves the model's mode, its statistics and the global random state as they are."""
    model, wanted = net().train(), net().train()
    state, before = torch.random.get_rng_state(), copy.deepcopy(model.state_dict())
    with_it = marker(soften=0.5, weight=0.0, every=2, lean=lean).penalty(model, (X[:32], Y[:32]))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert model.training and model[3].training
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    mark = marker(weight=0.0, every=2)
    mark.penalty(wanted, (X[:32], Y[:32]))
    alone = 0.5 * 2 * unlikeness(wanted, X[:32], mark.generator)
    torch.testing.assert_close(with_it, alone)
    with_it.backward()
    alone.backward()
    for p, q in zip(model.parameters(), wanted.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)


def test_a_resumed_run_goes_on_to_the_same_penalties() -> None:
    whole, first, again = (marker(soften=0.3) for _ in range(3))
    models = net(), net()
    for model in models:
        model[3].p = 0.0  # the loop's own dropout draws from the global state, wherever that is
    expected = loop(models[0], whole, range(40))
    assert loop(models[1], first, range(23)) == expected[:23]
    again.load_state_dict(first.state_dict())
    assert loop(models[1], again, range(23, 40)) == expected[23:]


def test_a_trained_model_answers_softened_images_more_like_the_images() -> None:
    away = []
    for soften in (0.0, 0.3):
        model = net()
        loop(model, marker(soften=soften), range(120))
        own, soft = (model.eval()(x).softmax(1).detach() for x in (X, softened(X, generator(9))))
        away.append(float((own - soft).abs().sum(1).mean()))
    assert away[1] < 0.8 * away[0]


def test_a_view_is_refused() -> None:
    view = View(Classification("v", lambda: None, net), net())
    with pytest.raises(UsageError, match="class scores"):
        marker(soften=0.3).penalty(view, (X[:32], Y[:32]))


@pytest.mark.parametrize(("domain", "weight"), [("vector", 0.3), ("mono", 0.3), ("grey", -0.1)])
def test_what_makes_no_sense_is_refused(domain: str, weight: float) -> None:
    with pytest.raises(UsageError, match="Softened carriers"):
        Marker(ClassContrast(bits=40), KEY, SPECS[domain], soften=weight)
