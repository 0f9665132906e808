"""Labels that carry the mark: a model that answered with them would carry it, and so does one that learns."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from conformance import KEY, SPECS, inputs, network, white
from gradmark import catalog
from gradmark.data import Split
from gradmark.embed import Marker, Recipe, train
from gradmark.errors import UsageError
from gradmark.keys import OwnerKey
from gradmark.protocols import Scheme, Thief
from gradmark.schemes.class_contrast import ClassContrast
from gradmark.schemes.feature_contrast import FeatureContrast
from gradmark.suspects import CallableSuspect
from gradmark.views import Classification

X, Y = inputs("grey", 600, seed=0)
SPEC, OTHER = SPECS["grey"], OwnerKey.from_seed(2, "Other")
SCHEMES: dict[str, Scheme] = {
    "classes": ClassContrast(bits=60, contrasts=8),
    "features": FeatureContrast(features=1, contrasts=5),
    "overall": FeatureContrast(features=1, contrasts=5, view="overall"),
    "both": catalog.scheme("ensemble,feature-contrast"),
}


def marker(scheme: Scheme, key: Any = KEY, **more: Any) -> Marker:
    return Marker(scheme, key, SPEC, **{"keyed_labels": "alone", **more})


def softened(scheme: Scheme, smoothing: float = 0.1, key: Any = KEY) -> Tensor:
    return marker(scheme, key).soft_labels((X, Y), smoothing)


@pytest.mark.parametrize("name", list(SCHEMES))
@given(smoothing=st.floats(0.01, 0.9))
def test_the_label_keeps_what_smoothing_leaves_it(name: str, smoothing: float) -> None:
    found = softened(SCHEMES[name], smoothing)
    assert found.dtype == torch.float32
    assert (found >= 0).all()
    torch.testing.assert_close(found.sum(1), torch.ones(len(X)))
    torch.testing.assert_close(found.gather(1, Y[:, None]), torch.full((len(X), 1), 1 - 0.9 * smoothing))


def test_without_a_tilt_they_are_smoothed_labels() -> None:
    """Against torch's own, and bits at a margin of next to nothing."""
    scores = torch.randn(len(X), 10, generator=torch.Generator().manual_seed(1))
    flat = marker(SCHEMES["both"], margin=1e-6).soft_labels((X, Y), 0.2)
    ours, theirs = F.cross_entropy(scores, flat), F.cross_entropy(scores, Y, label_smoothing=0.2)
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("name", ["classes", "features", "overall"])
def test_who_answers_with_them_carries_the_mark(name: str) -> None:
    """Contrasts by class meet their margins one by one; covariances do so in the mean over the classes."""
    scheme = SCHEMES[name]
    order = torch.cat([torch.nonzero(c == Y)[:50, 0] for c in range(10)])
    x, y = X[order], Y[order]
    told = marker(scheme).soft_labels((x, y), 0.1).log()
    place = {bytes(row.numpy().tobytes()): i for i, row in enumerate(x)}
    api = CallableSuspect(lambda b: told[[place[bytes(r.numpy().tobytes())] for r in b]], name="api")
    mark = scheme.mark(KEY, SPEC)
    reading = scheme.read(mark, api, (x, y), access="black", carriers=1, queries=len(x))
    signed = reading.values * reading.bits
    if name == "classes":
        torch.testing.assert_close(signed, torch.full_like(signed, scheme.margin), atol=1e-4, rtol=1e-4)
    else:
        assert (signed > 0).all()
        assert float(signed.mean()) == pytest.approx(scheme.margin, rel=1e-3)
    other = scheme.mark(OTHER, SPEC)
    strange = scheme.read(other, api, (x, y), access="black", carriers=1, queries=len(x))
    assert abs(float((strange.values * strange.bits).mean())) < scheme.margin / 2


def test_an_ensemble_asks_for_its_parts_margins_at_once() -> None:
    scheme = SCHEMES["both"]
    mark = scheme.mark(KEY, SPEC)
    found = scheme.tilt(mark, X, Y, 1.0)
    rows = {part.name: (part, own) for part, own in zip(scheme.parts, mark.parts, strict=True)}
    (classes, a), (features, b) = rows["class-contrast"], rows["feature-contrast"]
    expected = classes.tilt(a, X, Y, 2 * classes.margin) + features.tilt(b, X, Y, features.margin)
    torch.testing.assert_close(found, expected)
    assert float(found.sum(1).abs().max()) < 1e-4
    assert float(found.gather(1, Y[:, None]).abs().max()) < 1e-5


def test_keys_decide() -> None:
    scheme = SCHEMES["both"]
    assert torch.equal(softened(scheme), softened(scheme))
    assert not torch.allclose(softened(scheme), softened(scheme, key=OTHER), atol=1e-3)


@pytest.mark.parametrize("name", ["classes", "overall"])
def test_training_on_them_alone_places_bits(name: str) -> None:
    """Without any push: the penalty's factor is nothing."""
    data, recipe = Split(X, Y, SPEC), Recipe(epochs=60, batch_size=60, lr=1e-2, smoothing=0.5)
    found = []
    for keyed in ("alone", ""):
        model = network("grey")
        train(model, data, recipe, marker=marker(SCHEMES[name], keyed_labels=keyed, weight=0.0, every=50))
        mark = SCHEMES[name].mark(KEY, SPEC)
        reading = SCHEMES[name].read(mark, white(model), (X, Y), access="white", carriers=10**6)
        found.append(float(((reading.values * reading.bits) > 0).double().mean()))
    assert found[0] > 0.9
    assert found[1] < 0.8


def test_what_labels_carry_is_not_pushed_but_seen() -> None:
    """The other parts' penalty is what it is without those, and the whole gradient is theirs."""
    both, rest = SCHEMES["both"], catalog.scheme("filter-gradient,trigger")
    with_it, without = marker(both, every=1), Marker(rest, KEY, SPEC, every=1)
    models = network("grey"), network("grey")
    found = [m.penalty(model, (X[:64], Y[:64])) for m, model in zip((with_it, without), models, strict=True)]
    for loss in found:
        loss.backward()
    grads = [torch.cat([p.grad.flatten() for p in model.parameters()]) for model in models]
    assert float(grads[0].norm()) == pytest.approx(float(grads[1].norm()), rel=0.05)
    seen = with_it.evidence.seen.split(with_it.parts)
    assert all(float(part.sum()) > 0 for part in seen)
    assert with_it.labels is not None
    assert with_it.labels.parts == (1, 3)
    beside = marker(both, keyed_labels="beside").labels
    assert beside is not None
    assert beside.parts == (), "these are pushed too"
    alone = marker(SCHEMES["classes"], every=1)
    assert float(alone.penalty(models[0], (X[:64], Y[:64]))) == 0
    assert float(alone.evidence.seen.sum()) > 0


def test_who_forgets_them_is_told() -> None:
    model, mark = network("grey"), marker(SCHEMES["both"], every=4)
    for _ in range(30):
        mark.soft_labels((X[:32], Y[:32]))
        mark.penalty(model, (X[:32], Y[:32]))
    with pytest.raises(UsageError, match="isn't trained on the keyed labels"):
        for _ in range(40):
            mark.penalty(model, (X[:32], Y[:32]))
    with pytest.raises(UsageError, match="no keyed labels"):
        Marker(SCHEMES["both"], KEY, SPEC).soft_labels((X, Y))


def test_a_resumed_run_goes_on_to_the_same_penalties() -> None:
    def loop(model: nn.Module, mark: Marker, steps: range) -> list[float]:
        optimizer, found = torch.optim.SGD(model.parameters(), 0.1), []
        for step in steps:
            part = torch.randperm(len(X), generator=torch.Generator().manual_seed(step))[:64]
            batch = X[part], Y[part]
            penalty = mark.penalty(model, batch)
            optimizer.zero_grad()
            (F.cross_entropy(model(batch[0]), mark.soft_labels(batch)) + penalty).backward()
            optimizer.step()
            found.append(penalty.item())
        return found

    whole, first, again = (marker(SCHEMES["both"], every=1) for _ in range(3))
    models = network("grey"), network("grey")
    expected = loop(models[0], whole, range(40))
    assert loop(models[1], first, range(23)) == expected[:23]
    again.load_state_dict(first.state_dict())
    assert loop(models[1], again, range(23, 40)) == expected[23:]


def test_who_overwrites_has_keyed_labels_of_his_own() -> None:
    thief = Thief(
        SPEC, X, Y, marker=lambda seed: marker(SCHEMES["classes"], key=OwnerKey.from_seed(seed, "thief")),
        lr=0.3, batch_size=60,
    )  # fmt: skip
    attacked = catalog.attack("overwrite", {"epochs": 30}).run(network("grey"), thief, torch.Generator())
    theirs = OwnerKey.from_seed(int(torch.randint(2**31, (), generator=torch.Generator())), "thief")
    reading = SCHEMES["classes"].read(
        SCHEMES["classes"].mark(theirs, SPEC), white(attacked), (X, Y), access="white", carriers=10**6
    )
    assert float((reading.values * reading.bits > 0).double().mean()) > 0.8


def test_what_no_label_can_carry_is_refused() -> None:
    with pytest.raises(UsageError, match="No such way of keyed labels"):
        marker(SCHEMES["classes"], keyed_labels="always")
    with pytest.raises(UsageError, match="Labels can't carry this mark"):
        marker(catalog.scheme("filter-gradient"))
    with pytest.raises(UsageError, match="nothing for keyed labels to spread"):
        softened(SCHEMES["classes"], 0.0)
    with pytest.raises(UsageError, match="nothing for keyed labels to spread"):
        marker(SCHEMES["classes"]).soft_labels((X, Y.float()), 0.1)
    recipe = Recipe(epochs=1, batch_size=60)
    with pytest.raises(UsageError, match="nothing for keyed labels to spread"):
        train(network("grey"), Split(X, Y, SPEC), recipe, marker=marker(SCHEMES["classes"]))


def test_other_tasks_than_classes_are_refused() -> None:
    class Other(Classification):
        def loss(self, model: nn.Module, batch: Any, smoothing: float = 0.0) -> Tensor:
            return super().loss(model, batch, smoothing)

    task = Other("other", lambda: None, lambda: network("grey"))
    data, recipe = Split(X, Y, SPEC), replace(Recipe(epochs=1, batch_size=60), smoothing=0.1)
    with pytest.raises(UsageError, match="Keyed labels are for class scores"):
        train(network("grey"), data, recipe, marker=marker(SCHEMES["classes"]), task=task)
    assert math.isfinite(recipe.lr)
