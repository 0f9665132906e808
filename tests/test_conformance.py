"""Laws that every scheme obeys on every domain. A new scheme is here by its line in the catalog."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from conformance import (
    CARRIERS,
    CLASSES,
    FINE,
    KEY,
    NAMES,
    SPECS,
    Counting,
    inputs,
    mark_file,
    needs,
    network,
    pool,
    reads,
    rewritten,
    same_world,
    scheme_for,
    strangers,
    trained,
    uniform_p,
    white,
    world,
)
from gradmark import catalog
from gradmark.codec import MarkFile
from gradmark.errors import MismatchError, ModelError
from gradmark.keys import OwnerKey
from gradmark.protocols import Access, ModelSpec, Reading
from gradmark.stats import ks_uniform
from gradmark.verify import verify

WRONG = 200
COMPARING = ("class-contrast", "feature-contrast", "ensemble")
pytestmark = [
    pytest.mark.parametrize("name", NAMES),
    pytest.mark.parametrize("domain", list(SPECS)),
]
both = pytest.mark.parametrize("access", ["white", "black"])
methods = pytest.mark.parametrize("method", ["exact", "central-difference"])


@pytest.fixture(autouse=True)
def applies(request: pytest.FixtureRequest, name: str) -> None:
    """A scheme that needs the weights has no black-box reading to try."""
    if request.node.callspec.params.get("access") == "black" and needs(name) == "white":
        pytest.skip("needs the weights: refused, see test_what_needs_weights_is_refused_without")


def read(
    name: str, domain: str, model: Any, key: OwnerKey = KEY, access: Access = "white", **more: Any
) -> Reading:
    """A reading by the settings of the domain; 1000 queries unless told otherwise."""
    queries = more.pop("queries", 1000)
    scheme = scheme_for(name, domain, **more)
    suspect = white(model) if isinstance(model, nn.Module) else model
    mark = scheme.mark(key, SPECS[domain])
    return scheme.read(mark, suspect, pool(domain), access=access, carriers=CARRIERS, queries=queries)


# --- evidence ---------------------------------------------------------------------------------------------


@both
def test_an_embedded_mark_is_found(name: str, domain: str, access: Access) -> None:
    verdict = verify(mark_file(name, domain), KEY, white(trained(name, domain)), pool(domain), access=access)
    assert verdict.outcome == "owned"
    assert verdict.log10_p <= -6


@both
def test_the_control_carries_nothing(name: str, domain: str, access: Access) -> None:
    control = trained(name, domain, marked=False)
    verdict = verify(mark_file(name, domain), KEY, white(control), pool(domain), access=access)
    assert verdict.outcome == "no-evidence"
    assert verdict.log10_p > -4


def test_the_marked_network_still_does_its_task(name: str, domain: str) -> None:
    x, labels = pool(domain)
    with torch.no_grad():
        right = (trained(name, domain)(x).argmax(1) == labels).double().mean()
        control = (trained(name, domain, marked=False)(x).argmax(1) == labels).double().mean()
    assert right >= control - 0.06


@pytest.mark.statistics
@both
def test_wrong_keys_find_nothing_in_a_marked_network(name: str, domain: str, access: Access) -> None:
    """Over 200 other keys the p-values are uniform and no key owns the network."""
    generator, p_values = np.random.default_rng(11), []
    model = trained(name, domain)
    for seed in range(WRONG):
        key = OwnerKey.from_seed(1000 + seed)
        mark = mark_file(name, domain, key, carriers=40)
        suspect = white(model, digest="sha256:")
        verdict = verify(mark, key, suspect, pool(domain), access=access, queries=160)
        assert verdict.outcome != "owned"
        assert verdict.reading is not None
        p_values.append(uniform_p(verdict.reading, generator))
    assert ks_uniform(p_values)[1] > 0.001


@pytest.mark.parametrize("kind", list(strangers("vector")))
@both
def test_strangers_own_nothing(name: str, domain: str, access: Access, kind: str) -> None:
    """Networks with random, zero and exploding weights, and one with a huge structured gradient."""
    suspect = white(strangers(domain)[kind])
    for seed in range(5):
        key = OwnerKey.from_seed(2000 + seed)
        if (name, kind) == ("path-weights", "structured"):
            with pytest.raises(MismatchError, match="no hidden units"):
                verify(mark_file(name, domain, key), key, suspect, pool(domain), access=access)
            continue
        verdict = verify(mark_file(name, domain, key), key, suspect, pool(domain), access=access, queries=400)
        # A cross-entropy has no gradient left where the network is as sure of the class as a float can be.
        # A constant is no silence where classes are compared: it says that none of them is preferred.
        silent = kind == "constant" and name not in COMPARING
        silent |= name == "gradsigns" and kind == "loud" and verdict.ties > 0
        assert verdict.outcome == ("inconclusive" if silent else "no-evidence")
        if silent:
            assert verdict.ties == verdict.n_bits


def test_a_function_that_ignores_its_input_owns_nothing(name: str, domain: str) -> None:
    """Gradients: nothing to read white-box, so refused; only ties black-box, so inconclusive. Scores: they
    are what they are. Weights: there are none. An ensemble is left with its part that reads scores."""

    class Deaf(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.arange(CLASSES).float().repeat(len(x), 1)

    if reads(name) == "scores":
        for access in ("white", "black"):
            verdict = verify(mark_file(name, domain), KEY, white(Deaf()), pool(domain), access=access)
            assert verdict.outcome == "no-evidence"
        return
    in_weights = MismatchError, "no weights|Hidden units can't be told"
    error, match = in_weights if reads(name) == "weights" else (ModelError, "no input gradient")
    with pytest.raises(error, match=match):
        verify(mark_file(name, domain), KEY, white(Deaf()), pool(domain))
    if reads(name) == "weights":
        return
    verdict = verify(mark_file(name, domain), KEY, white(Deaf()), pool(domain), access="black")
    if name == "ensemble":
        assert verdict.reading is not None
        assert (verdict.outcome, verdict.ties) == ("no-evidence", verdict.reading.parts[0])
        return
    assert (verdict.outcome, verdict.ties, verdict.log10_p) == ("inconclusive", verdict.n_bits, 0.0)


def test_what_needs_weights_is_refused_without(name: str, domain: str) -> None:
    if needs(name) != "white":
        pytest.skip("reads an API too")
    for access in ("white", "black"):
        with pytest.raises(MismatchError, match="needs the model itself"):
            read(name, domain, Counting(trained(name, domain)), access=access)


def test_an_inverted_mark_is_no_evidence(name: str, domain: str) -> None:
    if reads(name) == "weights":
        pytest.skip("what follows the scores leaves the weights alone")
    marked = trained(name, domain)
    inverted = nn.Sequential(marked, Negate())
    verdict = verify(mark_file(name, domain), KEY, white(inverted), pool(domain))
    assert verdict.outcome == "no-evidence"
    assert verdict.log10_p > -1e-3


class Negate(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return -x


# --- the mark ---------------------------------------------------------------------------------------------


def test_a_mark_follows_from_key_and_spec_alone(name: str, domain: str) -> None:
    model = trained(name, domain)
    first = read(name, domain, model)
    again = read(name, domain, model, OwnerKey.from_seed(1, "Owner"))
    other = read(name, domain, model, OwnerKey.from_seed(2, "Owner"))
    assert torch.equal(first.values, again.values)
    assert torch.equal(first.bits, again.bits)
    assert set(first.bits.tolist()) == {-1.0, 1.0}
    assert not torch.equal(first.bits, other.bits)
    assert not torch.equal(first.values, other.values)


def test_another_spec_is_another_mark(name: str, domain: str) -> None:
    spec, scheme = SPECS[domain], scheme_for(name, domain)
    wider = ModelSpec(spec.domain, spec.input_shape, spec.n_classes + 1, spec.low, spec.high, spec.levels)
    coarser = ModelSpec(spec.domain, spec.input_shape, spec.n_classes, spec.low, spec.high, 31)
    marks = [scheme.mark(KEY, s).bits.tolist() for s in (spec, wider, coarser)]
    assert len({tuple(bits) for bits in marks}) == 3


def test_bytes_round_trip(name: str, domain: str) -> None:
    """A spec given with whole numbers reads the same after a trip through the file."""
    spec = SPECS[domain]
    whole = [None if bound is None else int(bound) for bound in (spec.low, spec.high)]
    spec = ModelSpec(spec.domain, spec.input_shape, spec.n_classes, *whole, spec.levels, 1)
    scheme, model = scheme_for(name, domain), trained(name, domain)
    file = MarkFile.from_bytes(
        MarkFile.create(KEY, name, scheme.parameters(), spec, "signed-rank", CARRIERS).to_bytes()
    )
    rebuilt = catalog.scheme(file.scheme, file.scheme_parameters)
    assert rebuilt == scheme
    for access in ("white", "black") if needs(name) == "black" else ("white",):
        a, b = (
            s.read(s.mark(KEY, p), white(model), pool(domain), access=access, carriers=CARRIERS, queries=300)
            for s, p in ((scheme, spec), (rebuilt, file.spec))
        )
        assert torch.equal(a.values, b.values)
        assert torch.equal(a.bits, b.bits)


# --- reading ----------------------------------------------------------------------------------------------


@both
@pytest.mark.parametrize("training", [False, True])
def test_reading_changes_nothing(name: str, domain: str, access: Access, training: bool) -> None:
    body = network(domain)
    model = nn.Sequential(*body[:-1], nn.BatchNorm1d(64), nn.Dropout(0.5), body[-1]).train(training)
    nn.functional.cross_entropy(model(pool(domain)[0][:20]), pool(domain)[1][:20]).backward()
    before = world(model)
    verify(mark_file(name, domain), KEY, white(model), pool(domain), access=access, queries=100)
    assert same_world(before, world(model))


@both
def test_readings_dont_depend_on_the_batch_size(name: str, domain: str, access: Access) -> None:
    model, scheme = trained(name, domain), scheme_for(name, domain)
    mark = scheme.mark(KEY, SPECS[domain])
    a, b = (
        scheme.read(
            mark, white(model, batch_size=size), pool(domain), access=access, carriers=CARRIERS, queries=500
        ).values
        for size in (7, 256)
    )
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 * float(b.abs().max()))


def test_black_box_reading_tends_to_the_white_box_one(name: str, domain: str) -> None:
    """With every direction of every carrier and a small step, two queries are the derivative."""
    if reads(name) != "gradients" or name == "ensemble":
        pytest.skip("reads no derivative, or not only")
    model = network(domain, seed=6, activation=nn.Tanh)
    spec = SPECS[domain]
    free = ModelSpec(spec.domain, spec.input_shape, spec.n_classes, scale=spec.scale)
    settings, near = FINE[name]
    scheme = scheme_for(name, domain, **settings)
    mark = scheme.mark(KEY, free)
    a = scheme.read(mark, white(model), pool(domain), access="white", carriers=12)
    b = scheme.read(mark, white(model), pool(domain), access="black", carriers=12, queries=10**6)
    assert b.queries < 10**6
    torch.testing.assert_close(b.values, a.values, rtol=near, atol=near * float(a.values.abs().max()))


@both
def test_function_preserving_rewrites_leave_the_readings(name: str, domain: str, access: Access) -> None:
    """Theorem: a reading is the same for two networks that compute the same function.

    It depends on the scores and on their gradient with respect to the input alone, and both belong to
    the function. So permuting hidden units, or scaling them through a ReLU (which breaks nine published
    white-box schemes), can move a reading by rounding only. Of the schemes that read weights one has that law
    all the same: the products that it reads cancel such rewrites.
    """
    if name == "weights":
        pytest.skip("reads the weights, not the function")
    model = trained(name, domain)
    for seed in range(3):
        twin = rewritten(model, seed)
        assert not torch.equal(twin[-3].weight, model[-3].weight)
        a, b = (read(name, domain, m, access=access).values for m in (model, twin))
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4 * float(a.abs().max()))


def test_queries_are_counted_and_never_exceed_the_budget(name: str, domain: str) -> None:
    if needs(name) == "white":
        pytest.skip("asks nothing")
    model = trained(name, domain)
    spent = []
    for budget in (2, 3, 101, 1000, 10**6):
        suspect = Counting(model)
        reading = read(name, domain, suspect, access="black", queries=budget)
        assert reading.queries == suspect.count <= budget
        assert reading.values.shape == reading.bits.shape
        steps = [queries for queries, _ in reading.history]
        assert steps == sorted(set(steps))
        assert steps[-1:] == [reading.queries] * bool(reading.queries)
        assert all(torch.equal(values, reading.values) for _, values in reading.history[-1:])
        spent.append(reading.queries)
    assert spent == sorted(spent)
    assert spent[0] == 2 or name == "ensemble", "a share of two queries is no pair"
    assert spent[4] < 10**6
    if name == "filter-gradient":
        assert spent[:4] == [2, 2, 100, 1000]


def test_white_box_reading_costs_no_query(name: str, domain: str) -> None:
    reading = read(name, domain, trained(name, domain))
    assert (reading.queries, reading.access) == (0, "white")
    scheme: Any = scheme_for(name, domain)
    each = max(getattr(part, "per_carrier", 1) for part in getattr(scheme, "parts", (scheme,)))
    assert 0 < reading.carriers <= CARRIERS * each
    assert name != "filter-gradient" or reading.carriers == CARRIERS


# --- the penalty ------------------------------------------------------------------------------------------


@methods
def test_the_gradient_of_the_penalty_is_right(name: str, domain: str, method: str) -> None:
    """Against central differences along random directions in weight space, in float64, without kinks."""
    model = network(domain, seed=8, activation=nn.GELU).double()
    x, labels = inputs(domain, 16, seed=3)
    batch = x.double(), labels
    scheme = scheme_for(name, domain)
    mark = scheme.mark(KEY, SPECS[domain])

    def value() -> Tensor:
        """Any smooth function of the readings will do; this one weighs each of them differently."""
        signed, _ = scheme.probe(mark, model, batch, torch.Generator().manual_seed(2), method)
        assert signed.dtype == torch.float64
        return (signed * torch.arange(1, signed.numel() + 1).reshape(signed.shape)).tanh().sum()

    loss = value()
    weights = list(model.parameters())
    gradient = torch.autograd.grad(loss, weights, allow_unused=True)
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        step = [
            torch.randn(w.shape, generator=generator, dtype=torch.float64) * w.detach().std() for w in weights
        ]
        claimed = sum(float((g * s).sum()) for g, s in zip(gradient, step, strict=True) if g is not None)
        size = [float(g.norm() * s.norm()) for g, s in zip(gradient, step, strict=True) if g is not None]
        ends = []
        for h in (1e-6, -1e-6):
            with torch.no_grad():
                for w, s in zip(weights, step, strict=True):
                    w.add_(s, alpha=h)
            ends.append(value().item())
            with torch.no_grad():
                for w, s in zip(weights, step, strict=True):
                    w.sub_(s, alpha=h)
        found = (ends[0] - ends[1]) / 2e-6
        assert claimed == pytest.approx(found, rel=1e-5, abs=1e-6 * sum(size))


@methods
def test_both_methods_estimate_the_readings(name: str, domain: str, method: str) -> None:
    """What training sees is, on average, what verification reads: the signs agree on a marked network."""
    scheme, model = scheme_for(name, domain), trained(name, domain)
    mark = scheme.mark(KEY, SPECS[domain])
    signed, index = scheme.probe(mark, model, pool(domain), torch.Generator().manual_seed(0), method)
    assert index.min() >= 0
    assert index.max() < len(mark.bits)
    seen, place = torch.unique(index, return_inverse=True)
    single = signed.detach().flatten()
    sums = torch.zeros(len(seen), dtype=single.dtype).index_add_(0, place.flatten(), single)
    assert float((sums > 0).double().mean()) > 0.6
    # Noisy parts weigh as much as the others in an ensemble: .595 of its single readings agree. And one input
    # is a small part of a covariance.
    if name not in ("ensemble", "feature-contrast"):
        assert float((single > 0).double().mean()) > 0.6
