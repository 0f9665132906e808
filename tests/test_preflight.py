"""The numeric preflight: right where the gradient is right, and a refusal with reasons where it isn't."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from conformance import KEY, SPECS, inputs, network, pool, same_world, scheme_for, world
from gradmark.embed import Marker, check_method, choose_method
from gradmark.embed.preflight import some_carriers
from gradmark.errors import MismatchError, PreflightError
from gradmark.schemes.feature_contrast import FeatureContrast
from strange import (
    STEREO,
    VECTOR,
    Attention,
    Checkpointed,
    Custom,
    DeepSpeedEngine,
    Frames,
    Moody,
    Remembering,
    Stochastic,
    Stuck,
    WrongFirst,
    WrongSquare,
    seeded,
)

METHODS = ["exact", "central-difference"]


def check(model: nn.Module, method: str, domain: str = "vector") -> Any:
    scheme = scheme_for("filter-gradient", domain)
    batch = {"vector": VECTOR, "stereo": STEREO}.get(domain) or inputs(domain, 8, seed=0)
    return check_method(scheme, scheme.mark(KEY, SPECS[domain]), model, batch, method)


def choose(model: nn.Module, wanted: str = "auto", domain: str = "vector") -> Any:
    scheme = scheme_for("filter-gradient", domain)
    batch = {"vector": VECTOR, "stereo": STEREO}[domain]
    return choose_method(scheme, scheme.mark(KEY, SPECS[domain]), model, batch, wanted)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("domain", ["vector", "grey", "stereo"])
@pytest.mark.parametrize("activation", [nn.Tanh, nn.ReLU])
def test_plain_networks_pass(method: str, domain: str, activation: type[nn.Module]) -> None:
    found = check(network(domain, activation=activation), method, domain)
    assert found.ok
    assert found.error < 1e-4
    assert found.reason == ""


@pytest.mark.parametrize("method", METHODS)
def test_batch_norm_passes_in_training(method: str) -> None:
    body = network("vector")
    assert check(nn.Sequential(*body[:-1], nn.BatchNorm1d(64), body[-1]).train(), method).ok


@pytest.mark.parametrize("method", METHODS)
def test_an_lstm_passes_on_the_cpu(method: str) -> None:
    model = seeded(lambda: Frames(nn.LSTM(32, 24, batch_first=True), 24))
    found = check(model, method, "stereo")
    assert found.ok
    assert found.own is not None  # float32, where a fused kernel would run, which has one derivative only


@pytest.mark.parametrize("training", [False, True])
def test_fused_attention_is_computed_by_its_formula(training: bool) -> None:
    """The fused kernel has no second derivative; around the exact penalty another one runs."""
    model = seeded(lambda: Frames(Attention(), 32)).train(training)
    x = STEREO[0].clone().requires_grad_()
    (gradient,) = torch.autograd.grad(model(x)[0].square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"derivative|not implemented"):
        gradient.square().sum().backward()
    assert check(model, "exact", "stereo").ok
    assert choose(model, "auto", "stereo").method == "central-difference"


def test_multihead_attention_gets_a_method_that_is_right() -> None:
    model = seeded(lambda: Frames(nn.MultiheadAttention(32, 2, batch_first=True), 32)).eval()
    found = choose(model, "auto", "stereo")
    assert found.ok
    assert found.method == "central-difference"


def test_a_wrong_second_derivative_is_caught() -> None:
    """Silently wrong, which no exception tells: only the numbers do."""
    model = seeded(lambda: Custom(WrongSquare.apply))
    exact = check(model, "exact")
    assert not exact.ok
    assert exact.error > 1e-2
    assert "disagrees with a finite difference" in exact.reason
    assert check(model, "central-difference").ok
    assert choose(model).method == "central-difference"


def test_a_wrong_first_derivative_is_caught() -> None:
    model = seeded(lambda: Custom(WrongFirst.apply))
    assert not check(model, "central-difference").ok
    with pytest.raises(PreflightError) as refusal:
        choose(model)
    assert "central-difference: " in refusal.value.found
    assert "exact: " in refusal.value.found
    assert refusal.value.fix


def test_checkpointing() -> None:
    assert check(Checkpointed(False), "exact").ok
    assert check(Checkpointed(False), "central-difference").ok
    reentrant = check(Checkpointed(True), "exact")
    assert not reentrant.ok
    assert "heckpoint" in reentrant.reason
    assert choose(Checkpointed(True)).method == "central-difference"  # first order, by a backward pass


@pytest.mark.parametrize("reentrant", [False, True])
def test_what_is_checkpointed_runs_again_as_the_penalty_ran_it(reentrant: bool) -> None:
    """The step's own backward comes in training mode, with dropout and running statistics."""
    runs = []
    for model in (Remembering(False), Remembering(True, reentrant)):
        marker = Marker(scheme_for("filter-gradient", "vector"), KEY, SPECS["vector"], every=1, weight=1.0)
        penalty = marker.penalty(model.train(), VECTOR)
        penalty.backward()
        runs.append([p.grad for p in model.parameters()] + [penalty])
        assert torch.equal(model.block[0].running_mean, torch.zeros(64))
    for a, b in zip(*runs, strict=True):
        assert torch.allclose(a, b, atol=1e-7)


@pytest.mark.parametrize("every", [1, 3])
def test_reentrant_checkpointing_trains_like_none(every: int) -> None:
    """Through the balance of gradient norms too, which autograd.grad can't take here."""
    runs = []
    for model in (Checkpointed(True), Checkpointed(False)):
        marker = Marker(scheme_for("filter-gradient", "vector"), KEY, SPECS["vector"], every=every)
        kept = torch.ones_like(model.body[0].weight)
        model.body[0].weight.grad = kept
        penalties = [marker.penalty(model, VECTOR) for _ in range(2 * every)]
        assert model.body[0].weight.grad is kept
        sum(penalties).backward()
        runs.append((model.body[0].weight.grad, [p.item() for p in penalties]))
    assert torch.allclose(runs[0][0], runs[1][0])
    assert runs[0][1] == pytest.approx(runs[1][1])


@pytest.mark.parametrize("method", METHODS)
def test_a_stochastic_forward_is_refused(method: str) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        assert not check(Stochastic(), method).ok
        with pytest.raises(PreflightError, match="disagrees"):
            choose(Stochastic(), method)


@pytest.mark.parametrize("method", METHODS)
def test_frozen_and_dead_models_are_refused(method: str) -> None:
    assert "no weight" in check(network("vector").requires_grad_(False), method).reason
    dead = network("vector")
    with torch.no_grad():
        for weight in dead.parameters():
            weight.zero_()
    found = check(dead, method)
    assert not found.ok
    assert "zero" in found.reason or "disagrees" in found.reason  # cancellation may leave 1e-17


@pytest.mark.parametrize("method", METHODS)
def test_a_model_that_cant_be_copied_is_checked_as_it_is(method: str) -> None:
    """And its weights are afterwards what they were, bit for bit, whatever backward is pending."""
    model = Stuck(network("vector"))
    pending = model(VECTOR[0]).sum()
    before = world(model)
    found = check(model, method)
    assert found.ok
    assert found.own is None
    assert same_world(before, world(model))
    pending.backward()
    assert not check(Stuck(seeded(lambda: Custom(WrongFirst.apply))), method).ok


def test_the_model_itself_is_asked_too() -> None:
    found = check(Moody(), "central-difference")
    assert not found.ok
    assert found.error < 1e-4
    assert found.own == pytest.approx(0.9, abs=0.01)
    assert "float64 copy" in found.reason


def test_a_bound_forward_doesnt_fool_the_copy() -> None:
    """As accelerate binds one for autocast: the copy's would ask the old weights."""
    model = network("vector")
    plain = model.forward
    model.forward = lambda x: plain(x).float()
    assert check(model, "central-difference").ok


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_passes(dtype: torch.dtype) -> None:
    with torch.autocast("cpu", dtype):
        found = check(network("vector"), "central-difference")
    assert found.ok
    assert found.own is not None
    assert 1e-4 < found.own < 0.3


@pytest.mark.filterwarnings("ignore::UserWarning")  # dynamo's own
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("inside", [False, True])
def test_compiled_models_run_as_written(method: str, inside: bool) -> None:
    body = network("vector")
    if inside:
        body[2] = torch.compile(body[2], backend="aot_eager")
    model = body if inside else torch.compile(body, backend="aot_eager")
    model(VECTOR[0])
    assert check(model, method).ok


def test_deepspeed_is_refused() -> None:
    zero3 = network("vector")
    zero3[0].weight.ds_id = 0
    for model in (DeepSpeedEngine(), zero3):
        with pytest.raises(PreflightError, match=r"DeepSpeed.*FSDP2"):
            check(model, "central-difference")


@pytest.mark.parametrize("method", METHODS)
def test_a_failing_forward_is_a_reason(method: str) -> None:
    class Fails(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(3))

        def forward(self, x: Tensor) -> Tensor:
            raise NotImplementedError

    assert "NotImplementedError" in check(Fails(), method).reason


@pytest.mark.parametrize("wanted", METHODS)
def test_a_wanted_method_is_respected(wanted: str) -> None:
    assert choose(network("vector"), wanted).method == wanted


def test_auto_prefers_the_central_difference() -> None:
    assert choose(network("vector")).method == "central-difference"


@pytest.mark.parametrize("method", METHODS)
def test_the_model_and_the_world_stay(method: str) -> None:
    body = network("vector")
    model = nn.Sequential(*body[:-1], nn.BatchNorm1d(64), nn.Dropout(0.5), body[-1]).train()
    before = world(model)
    check(model, method)
    assert same_world(before, world(model))


def test_a_switching_unit_is_no_wrong_gradient() -> None:
    """Units a hair from where they switch: the derivative's jump lies in the first finite step, no wider."""
    model = network("vector", activation=nn.ReLU).double()
    first = model[0]
    assert isinstance(first, nn.Linear)
    x = VECTOR[0].double()
    with torch.no_grad():
        units = torch.arange(len(first.bias))
        first.bias -= first(x)[units % len(x), units] - 2e-9
    scheme = scheme_for("filter-gradient", "vector")
    assert check_method(scheme, scheme.mark(KEY, SPECS["vector"]), model, (x, VECTOR[1]), "exact").ok


def test_the_few_inputs_it_takes_are_of_one_class() -> None:
    """What varies within a class has no gradient on four inputs of four classes."""
    scheme = FeatureContrast(features=2, contrasts=4)
    mark, (x, labels) = scheme.mark(KEY, SPECS["grey"]), pool("grey")
    first = torch.cat([torch.nonzero(labels == c)[:2, 0] for c in range(9)]).reshape(9, 2).T.flatten()
    batch = x[first], labels[first]
    assert len(set(batch[1][:4].tolist())) == 4
    few = some_carriers(scheme, mark, batch)
    assert int((few[1] == few[1][0]).sum()) == 2
    assert choose_method(scheme, mark, network("grey"), batch).ok


@pytest.mark.parametrize("scale", [lambda x: 255 * x, lambda x: (x - 0.5) / 0.25])
def test_inputs_that_are_not_on_the_models_scale_are_refused_before_anything_is_trained(scale: Any) -> None:
    """Pixels up to 255, or normalised ones, where the spec says 0 to 1; verify would refuse them."""
    x, labels = pool("grey")
    marker = Marker(scheme_for("filter-gradient", "grey"), KEY, SPECS["grey"])
    with pytest.raises(MismatchError, match="normalisation"):
        marker.penalty(network("grey"), (scale(x[:16]), labels[:16]))
    augmented = (x[:16] + 0.2 * torch.randn(x[:16].shape, generator=torch.Generator().manual_seed(0))).float()
    assert torch.isfinite(marker.penalty(network("grey"), (augmented, labels[:16])))
