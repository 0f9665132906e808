"""The numeric preflight: right where the gradient is right, and a refusal with reasons where it isn't."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from conformance import KEY, SPECS, inputs, network, same_world, scheme_for, world
from gradmark.embed import check_method, choose_method
from gradmark.errors import PreflightError

METHODS = ["exact", "central-difference"]
VECTOR = inputs("vector", 8, seed=0)
STEREO = inputs("stereo", 8, seed=0)


def check(model: nn.Module, method: str, domain: str = "vector") -> Any:
    scheme = scheme_for("filter-gradient", domain)
    batch = {"vector": VECTOR, "stereo": STEREO}.get(domain) or inputs(domain, 8, seed=0)
    return check_method(scheme, scheme.mark(KEY, SPECS[domain]), model, batch, method)


def choose(model: nn.Module, wanted: str = "auto", domain: str = "vector") -> Any:
    scheme = scheme_for("filter-gradient", domain)
    batch = {"vector": VECTOR, "stereo": STEREO}[domain]
    return choose_method(scheme, scheme.mark(KEY, SPECS[domain]), model, batch, wanted)


def seeded(make: Any) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return make()


class Frames(nn.Module):
    """A signal (2, 256) cut into 16 frames of 32 numbers, a layer on the frames, a linear head."""

    def __init__(self, layer: nn.Module, wide: int) -> None:
        super().__init__()
        self.layer, self.head = layer, nn.Linear(wide, 10)

    def forward(self, x: Tensor) -> Tensor:
        frames = 10 * x.reshape(len(x), 16, 32)
        if isinstance(self.layer, nn.MultiheadAttention):
            return self.head(self.layer(frames, frames, frames, need_weights=False)[0].mean(1))
        return self.head(self.layer(frames)[0].mean(1))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(32, 96)

    def forward(self, x: Tensor) -> tuple[Tensor]:
        q, k, v = self.project(x).chunk(3, -1)
        return (F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None])[:, 0],)


class WrongSquare(torch.autograd.Function):
    """x squared, with a backward that hides from a second differentiation."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.twice = 2 * x.detach()
        return x * x

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0] * ctx.twice


class WrongFirst(torch.autograd.Function):
    """x, with a first derivative that is wrong already."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 1.0

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0] * 0.5


class Custom(nn.Module):
    def __init__(self, function: Any) -> None:
        super().__init__()
        self.first, self.last, self.function = nn.Linear(20, 16), nn.Linear(16, 10), function

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.function(self.first(x))))


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
    assert check(model, method, "stereo").ok


@pytest.mark.parametrize("training", [False, True])
def test_fused_attention_has_no_second_order(training: bool) -> None:
    """Exact is refused for its reason; auto goes to the central difference."""
    model = seeded(lambda: Frames(Attention(), 32)).train(training)
    exact = check(model, "exact", "stereo")
    assert not exact.ok
    assert "derivative" in exact.reason or "not implemented" in exact.reason
    assert choose(model, "auto", "stereo").method == "central-difference"
    with pytest.raises(PreflightError, match=r"exact: .*(derivative|not implemented)"):
        choose(model, "exact", "stereo")


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


class Checkpointed(nn.Module):
    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.body, self.reentrant = network("vector"), reentrant

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.body[0](x)
        return self.body[1:](checkpoint(torch.tanh, hidden, use_reentrant=self.reentrant))


def test_checkpointing() -> None:
    assert check(Checkpointed(False), "exact").ok
    assert check(Checkpointed(False), "central-difference").ok
    reentrant = check(Checkpointed(True), "exact")
    assert not reentrant.ok
    assert "heckpoint" in reentrant.reason
    # autograd.grad, which the preflight uses, is what reentrant checkpointing forbids
    with pytest.raises(PreflightError, match="non-reentrant"):
        choose(Checkpointed(True))


class Stochastic(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = network("vector")

    def forward(self, x: Tensor) -> Tensor:
        return self.body(F.dropout(x, 0.5, training=True))


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


def test_a_model_that_cant_be_copied_is_refused() -> None:
    class Stuck(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = network("vector")

        def __deepcopy__(self, memo: Any) -> Any:
            raise TypeError("never copied")

        def forward(self, x: Tensor) -> Tensor:
            return self.body(x)

    assert "never copied" in check(Stuck(), "exact").reason


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
