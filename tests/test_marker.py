"""The one line in a stranger's training loop: what it adds, and all that it leaves alone."""

from __future__ import annotations

import copy
import weakref
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from conformance import KEY, SPECS, inputs, network, same_world, scheme_for, white, world
from gradmark import catalog
from gradmark.embed import Marker
from gradmark.embed.wrappers import operations
from gradmark.ensemble import Ensemble
from gradmark.errors import PreflightError, UsageError
from gradmark.reference import without
from gradmark.schemes.class_contrast import ClassContrast
from gradmark.stats import fisher, run_test

X, Y = inputs("vector", 256, seed=0)
SCHEME = scheme_for("filter-gradient", "vector")


def make(**more: Any) -> Marker:
    return Marker(SCHEME, KEY, SPECS["vector"], **more)


def loop(model: nn.Module, marker: Marker, steps: int, start: int = 0) -> list[float]:
    """Plain SGD on batches that depend on the step alone; returns the penalties."""
    optimizer, found = torch.optim.SGD(model.parameters(), 0.1), []
    for step in range(start, start + steps):
        part = torch.randperm(len(X), generator=torch.Generator().manual_seed(step))[:64]
        penalty = marker.penalty(model, (X[part], Y[part]))
        loss = F.cross_entropy(unwrapped(model(X[part])), Y[part]) + penalty
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(penalty.item())
    return found


def unwrapped(out: Any) -> Tensor:
    return out[0] if isinstance(out, tuple) else out


class Noisy(nn.Module):
    """Batch norm, dropout, and a tuple of outputs."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(3)
            self.body = nn.Sequential(nn.Linear(20, 48), nn.BatchNorm1d(48), nn.ReLU(), nn.Dropout(0.3))
            self.head = nn.Linear(48, 10)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.body(x)
        return self.head(hidden), hidden


def test_one_line_marks() -> None:
    marker, model = make(weight=5.0, margin=0.5, every=1), network("vector")
    loop(model, marker, 200)
    status = marker.status()
    assert status.n_bits == 64
    assert status.match > 0.9
    assert status.log10_p < -10


@pytest.mark.parametrize("every", [1, 2, 3])
def test_skipped_steps_cost_nothing(every: int) -> None:
    marker, model = make(every=every, weight=1.0), network("vector")
    for step in range(7):
        penalty = marker.penalty(model, (X[:32], Y[:32]))
        assert penalty.shape == ()
        assert (penalty.item() == 0) == bool(step % every)
        assert penalty.requires_grad == (not step % every)


@pytest.mark.parametrize("method", ["auto", "exact", "central-difference"])
@pytest.mark.parametrize("training", [True, False])
def test_the_model_and_the_world_stay(method: str, training: bool) -> None:
    model = Noisy().train(training)
    model.body[1].eval()  # a frozen norm inside a training model
    marker = make(method=method, every=1)
    F.cross_entropy(model(X[:32])[0], Y[:32]).backward()
    before = world(model)
    for _ in range(20):
        penalty = marker.penalty(model, (X[:32], Y[:32]))
    assert same_world(before, world(model))
    penalty.backward()


def test_a_failing_forward_leaves_the_mode_as_it_was() -> None:
    model, marker = Noisy().train(), make(every=1)
    marker.penalty(model, (X[:32], Y[:32]))
    before = world(model)
    with pytest.raises(RuntimeError):
        marker.penalty(model, (X[:32, :7], Y[:32]))
    assert same_world(before, world(model))


@pytest.mark.parametrize("fixed", [None, 2.0])
def test_a_resumed_run_has_the_same_penalties(fixed: float | None) -> None:
    model, marker = network("vector"), make(weight=fixed, seed=4)
    loop(model, marker, 40)
    state, weights = copy.deepcopy(marker.state_dict()), copy.deepcopy(model.state_dict())
    on = loop(model, marker, 40, start=40)
    again, fresh = network("vector", seed=9), make(weight=fixed, seed=77)
    again.load_state_dict(weights)
    fresh.load_state_dict(state)
    assert fresh.status() == MarkStatusOf(state, fresh)
    assert loop(again, fresh, 40, start=40) == on
    assert all(
        torch.equal(a, b)
        for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True)
    )


def MarkStatusOf(state: dict[str, Any], like: Marker) -> object:
    """The status of yet another marker with the same state: a value, not an identity."""
    other = make(weight=like.fixed_weight)
    other.load_state_dict(copy.deepcopy(state))
    return other.status()


def test_its_state_survives_a_file(tmp_path: Any) -> None:
    model, marker = network("vector"), make()
    loop(model, marker, 10)
    torch.save(marker.state_dict(), tmp_path / "marker.pt")
    fresh = make()
    fresh.load_state_dict(torch.load(tmp_path / "marker.pt", weights_only=True))
    assert fresh.status() == marker.status()


def test_a_greater_budget_or_strength_pushes_harder() -> None:
    weights = []
    for more in ({"budget": 0.1}, {"budget": 1.0}, {"strength": 5.0}, {"strength": 5.0, "budget": 0.01}):
        marker = make(every=1, **more)
        marker.penalty(network("vector"), (X[:32], Y[:32]))
        weights.append(marker.status().weight)
    assert 0 < weights[0] < weights[1] < weights[2]
    assert weights[2] == weights[3]


def test_the_weight_can_be_fixed() -> None:
    one, two = make(weight=1.0, every=1), make(weight=2.5, every=1)
    model = network("vector")
    a, b = (marker.penalty(model, (X[:32], Y[:32])).item() for marker in (one, two))
    assert b == pytest.approx(2.5 * a)
    assert two.status().weight == 2.5


def test_the_push_relaxes_once_the_target_is_met() -> None:
    pushes = []
    for target in (-1.0, -300.0):
        marker = make(every=1, target_log10_p=target, strength=3.0, margin=0.3)
        loop(network("vector"), marker, 200)
        pushes.append(marker.status().push)
    assert pushes[0] < 0.5
    assert pushes[1] == 1.0


def test_the_same_seed_gives_the_same_penalties() -> None:
    runs = [loop(network("vector"), make(seed=seed), 20) for seed in (1, 1, 2)]
    assert runs[0] == runs[1] != runs[2]


@pytest.mark.parametrize("scale", [1.0, 1024.0])
@pytest.mark.parametrize("name", ["filter-gradient", "ensemble"])
def test_lean_is_the_same_gradient(name: str, scale: float) -> None:
    """Beside a task, scaled as GradScaler does, and with weights that the penalty doesn't reach."""
    runs = []
    for lean in (False, True):
        model = Noisy().eval()
        model.idle = nn.Linear(2, 2)
        marker = Marker(catalog.scheme(name), KEY, SPECS["vector"], lean=lean, weight=3.0, every=1)
        penalty = marker.penalty(model, (X[:32], Y[:32]))
        ((F.cross_entropy(model(X[:32])[0], Y[:32]) + penalty) * scale).backward()
        runs.append([p.grad for p in model.parameters()])
        assert penalty.item() > 0
    assert runs[1][-1] is None
    for a, b in zip(*runs, strict=True):
        assert (a is None) == (b is None)
        assert a is None or torch.allclose(a, b, rtol=1e-5, atol=1e-6 * scale)


def test_lean_lets_the_graph_go() -> None:
    found = []
    for lean in (False, True):
        marker = make(lean=lean, weight=3.0, every=1, method="central-difference")
        names, _ = operations(marker.penalty(network("vector"), (X[:32], Y[:32])))
        found.append(any(name.startswith("Addmm") for name in names))
    assert found == [True, False]


@pytest.mark.parametrize("name", ["class-contrast", "ensemble"])
def test_the_tasks_scores_spare_a_pass_and_nothing_else(name: str) -> None:
    """Where the carriers are the batch and nothing is random, the penalty and its gradient are the same."""
    scheme, runs = catalog.scheme(name), []
    for told in (False, True):
        model = network("vector")
        marker = Marker(scheme, KEY, SPECS["vector"], weight=3.0, every=1, method="central-difference")
        marker.penalty(model, (X[:32], Y[:32]))  # the first one looks at gradient norms, and asks for itself
        rows: list[int] = []
        scores = model(X[:32])
        counted = model.register_forward_hook(lambda _, x, __, rows=rows: rows.append(len(x[0])))
        penalty = marker.penalty(model, (X[:32], Y[:32]), scores if told else None)
        counted.remove()
        (F.cross_entropy(scores, Y[:32]) + penalty).backward()
        gradients = [p.grad for p in model.parameters()]
        runs.append((sum(rows), penalty, gradients, marker.status()))
    assert runs[0][0] == runs[1][0] + 32
    assert runs[0][1].item() == pytest.approx(runs[1][1].item(), rel=1e-5)
    assert all(
        torch.allclose(a, b, rtol=1e-4, atol=1e-6) for a, b in zip(runs[0][2], runs[1][2], strict=True)
    )
    assert runs[0][3] == runs[1][3]


@pytest.mark.parametrize(
    "scores",
    [torch.zeros(3, 10, requires_grad=True), torch.zeros(32, 10), torch.zeros(32, requires_grad=True)],
)
def test_scores_of_something_else_are_refused(scores: Tensor) -> None:
    marker, model = make(every=1), network("vector")
    marker.penalty(model, (X[:32], Y[:32]))
    with pytest.raises(UsageError, match="scores aren't what the model says"):
        marker.penalty(model, (X[:32], Y[:32]), scores)


def test_what_costs_nothing_never_rests() -> None:
    scheme = catalog.scheme("ensemble")
    marker = Marker(scheme, KEY, SPECS["vector"], ease=True)
    marker.evidence.readings += 100.0
    marker._penalties = 3
    assert marker._due(False) == []
    assert marker._due(False, (X, Y)) == [1]
    assert marker._due(True) == [0, 1, 2]


class _Held:
    """Lives as long as the graph that it was put into."""


class _Into(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, held: _Held) -> Tensor:
        ctx.held = held
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> Any:
        return upstream[0], None


def test_lean_holds_one_parts_graph_at_a_time() -> None:
    """What the first part's scores hang on is gone when the last part asks."""
    found: list[list[int]] = []
    for lean in (False, True):
        model, scheme = network("vector"), catalog.scheme("ensemble")
        marker = Marker(
            scheme, KEY, SPECS["vector"], lean=lean, weight=1.0, every=1, method="central-difference"
        )
        marker.penalty(model, (X[:32], Y[:32]))
        tokens: list[weakref.ref[_Held]] = []
        alive: list[int] = []

        def hook(_: Any, __: Any, out: Tensor, tokens: Any = tokens, alive: Any = alive) -> Tensor:
            alive.append(sum(token() is not None for token in tokens))
            held = _Held()
            tokens.append(weakref.ref(held))
            return _Into.apply(out, held)

        handle = model.register_forward_hook(hook)
        penalty = marker.penalty(model, (X[:32], Y[:32]))
        handle.remove()
        assert penalty.requires_grad
        found.append(alive)
    assert found == [[0, 1, 2], [0, 0, 0]]


def test_scaled_losses_train_like_unscaled_ones() -> None:
    runs = []
    for scaled in (False, True):
        model, marker = network("vector"), make(every=2)
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        scaler = torch.amp.GradScaler("cpu", enabled=scaled)
        for step in range(6):
            part = slice(32 * step, 32 * step + 32)
            loss = F.cross_entropy(model(X[part]), Y[part]) + marker.penalty(model, (X[part], Y[part]))
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
        runs.append((list(model.parameters()), marker.state_dict()["numbers"]))
    assert runs[0][1] == pytest.approx(runs[1][1], rel=1e-4)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(runs[0][0], runs[1][0], strict=True))


@pytest.mark.parametrize("method", ["exact", "central-difference"])
def test_autocast_is_no_obstacle(method: str) -> None:
    model, marker = network("vector"), make(method=method, weight=1.0, every=1)
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    for _ in range(3):
        with torch.autocast("cpu", torch.bfloat16):
            loss = F.cross_entropy(model(X[:64]), Y[:64]) + marker.penalty(model, (X[:64], Y[:64]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        assert loss.dtype == torch.float32
        assert bool(torch.isfinite(loss))


def test_dropout_batch_norm_and_tuples_are_no_obstacle() -> None:
    model, marker = Noisy().train(), make(weight=5.0, margin=0.5, every=1)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        loop(model, marker, 200)
    assert marker.status().log10_p < -6


def test_inputs_may_require_gradients_of_their_own() -> None:
    x = X[:32].clone().requires_grad_()
    make(weight=1.0, every=1).penalty(network("vector"), (x, Y[:32])).backward()
    assert x.grad is None


@pytest.mark.parametrize(
    "more",
    [
        {"target_log10_p": 0.0},
        {"budget": 0.0},
        {"budget": -1.0},
        {"margin": 0.0},
        {"carriers": 0},
        {"every": 0},
        {"method": "guess"},
    ],
)
def test_settings_without_sense_are_refused(more: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        make(**more)


def test_a_frozen_model_is_refused() -> None:
    with pytest.raises(PreflightError, match="no weight of the model requires a gradient"):
        make().penalty(network("vector").requires_grad_(False), (X[:32], Y[:32]))


def test_no_secret_is_shown() -> None:
    assert "FilterGradient(" in repr(make())
    assert "bits=64" in repr(make())
    assert "tensor" not in repr(make())


# --- what is natural is no merit -------------------------------------------------------------------------


def calibrated(scheme: Any = SCHEME) -> Any:
    return scheme.calibrated(KEY, SPECS["vector"], white(network("vector", seed=2)), (X, Y))


def having(scheme: Any, readings: Tensor, **more: Any) -> Marker:
    """A marker whose running readings, times bits, are these."""
    marker = Marker(scheme, KEY, SPECS["vector"], every=1, **more)
    seen = torch.full_like(readings, 50.0)
    marker.load_state_dict({**marker.state_dict(), "readings": readings, "seen": seen})
    return marker


def test_the_status_leaves_out_what_an_unmarked_network_reads() -> None:
    scheme = calibrated()
    mark = scheme.mark(KEY, SPECS["vector"])
    bits, noise = mark.bits.double(), torch.randn(64, generator=torch.Generator().manual_seed(1)).double()
    left = without(0.3 * bits + 0.3 * noise, mark.reference)
    marker = having(scheme, (left + 40 * mark.reference) * bits)
    wanted = run_test("signed-rank", (left * bits).numpy())
    assert 0.5 < marker.status().match == wanted.n_match / 64 < 1
    assert marker.status().log10_p == pytest.approx(wanted.log10_p)


def test_the_gate_leaves_out_what_an_unmarked_network_reads() -> None:
    """However much is read, a bit isn't placed while an unmarked network reads it too."""
    natural, batch = network("vector", seed=2), (X[:64], Y[:64])
    scheme = calibrated()
    mark = scheme.mark(KEY, SPECS["vector"])
    strong = 40 * mark.reference.abs().clamp_min(0.5)
    placed = having(SCHEME, strong, weight=1.0, carriers=64)
    assert placed.penalty(natural, batch).item() == 0.0
    sizes = 40 * mark.reference / mark.reference.norm()
    nothing = having(scheme, sizes * mark.bits.double(), weight=1.0, carriers=64)
    assert nothing.penalty(natural, batch).item() > 0.1
    placed = having(scheme, 40 * without(mark.bits.double(), mark.reference) * mark.bits.double(), weight=1.0)
    assert placed.status().match > 0.9
    assert placed.penalty(natural, batch).item() < 0.1 * nothing.penalty(natural, batch).item()


def test_an_ensembles_parts_have_references_of_their_own() -> None:
    first, second = calibrated(), ClassContrast(bits=40)
    for parts in ((first, second), (second, first), (first, calibrated(second))):
        scheme = Ensemble(parts)
        mark = scheme.mark(KEY, SPECS["vector"])
        generator = torch.Generator().manual_seed(6)
        readings = torch.randn(104, generator=generator, dtype=torch.float64) + 0.5
        marker = having(scheme, readings)
        rows = zip((readings * mark.bits.double()).split(mark.sizes), mark.parts, strict=True)
        left = [without(row, part.reference) * part.bits.double() for row, part in rows]
        results = [run_test("signed-rank", part.numpy()) for part in left]
        assert marker.status().log10_p == pytest.approx(fisher([r.log10_p for r in results]))
        assert marker.status().match == sum(r.n_match for r in results) / 104
        assert not torch.allclose(torch.cat(left), readings)


def test_a_scheme_states_its_own_aim_and_margin() -> None:
    ensemble = Marker(Ensemble((SCHEME, ClassContrast())), KEY, SPECS["vector"])
    assert (ensemble.target_log10_p, ensemble.margin) == (Ensemble.target_log10_p, Ensemble.margin)
    assert (make().target_log10_p, make().margin) == (-15.0, 0.3)
    assert make(target_log10_p=-7.0, margin=2.0).target_log10_p == -7.0


def test_one_line_marks_an_ensemble() -> None:
    scheme, model = Ensemble((calibrated(), calibrated(ClassContrast(bits=40)))), network("vector")
    marker = Marker(scheme, KEY, SPECS["vector"], weight=5.0, every=1)
    loop(model, marker, 400)
    status = marker.status()
    assert (status.n_bits, status.match > 0.9, status.log10_p < -15) == (104, True, True)
