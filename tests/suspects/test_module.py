"""A reading is right, and changes nothing in the module that is read."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from gradmark.errors import DataError, ModelError
from gradmark.protocols import BlackBox, WhiteBox
from gradmark.suspects import CallableSuspect, ModuleSuspect, check_scores, weights_digest


def network(seed: int = 0) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5), nn.Flatten(), nn.Linear(144, 3)
        )


class Counting(nn.Module):
    """Moves a buffer in place, replaces another, draws random numbers and may fail, in eval mode too."""

    calls: Tensor
    last: Tensor

    def __init__(self, fail: bool = False) -> None:
        super().__init__()
        self.inner, self.fail = network(), fail
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("last", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.last = torch.rand(1)
        if self.fail:
            raise RuntimeError("no luck\nsecond line")
        out: Tensor = self.inner(x)
        return out


class Returning(nn.Module):
    def __init__(self, wrap: Any) -> None:
        super().__init__()
        self.inner, self.wrap = network(), wrap

    def forward(self, x: Tensor) -> Any:
        return self.wrap(self.inner(x))


class Output:
    def __init__(self, logits: Tensor) -> None:
        self.logits = logits


def inputs(b: int = 5, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.rand(b, 1, 8, 8, generator=torch.Generator().manual_seed(1), dtype=dtype)


def test_scores_are_those_of_eval_mode_whatever_the_chunks() -> None:
    module = network()
    expected = copy.deepcopy(module).eval()(inputs()).detach()
    for size in (1, 2, 5, 256):
        scores = ModuleSuspect(module, batch_size=size).query(inputs())
        assert scores.dtype == torch.float32 and not scores.requires_grad
        torch.testing.assert_close(scores, expected)


def test_the_protocols_are_met() -> None:
    assert isinstance(ModuleSuspect(network()), WhiteBox)
    suspect = CallableSuspect(lambda x: x.flatten(1), name="f")
    assert isinstance(suspect, BlackBox) and not isinstance(suspect, WhiteBox)


@pytest.mark.parametrize("fail", [False, True])
@pytest.mark.parametrize("call", ["query", "vjp"])
def test_nothing_changes(call: str, fail: bool) -> None:
    module = Counting(fail)
    module.train()
    module.inner[1].eval()  # type: ignore[index]
    next(module.parameters()).requires_grad_(False)
    state = {k: v.clone() for k, v in module.state_dict().items()}
    buffers = {name: id(buffer) for name, buffer in module.named_buffers()}
    flags = [(p.training) for p in module.modules()]
    needs = [p.requires_grad for p in module.parameters()]
    suspect, before = ModuleSuspect(module, batch_size=2), torch.get_rng_state()
    try:
        suspect.query(inputs()) if call == "query" else suspect.vjp(inputs(), torch.ones(5, 3))
        assert not fail
    except ModelError as error:
        assert fail and "no luck" in str(error) and "second line" not in str(error)
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(state[k], v) for k, v in module.state_dict().items())
    assert buffers == {name: id(buffer) for name, buffer in module.named_buffers()}
    assert flags == [p.training for p in module.modules()]
    assert needs == [p.requires_grad for p in module.parameters()]
    assert all(p.grad is None for p in module.parameters())
    assert suspect.digest == weights_digest(module)


def test_a_pending_backward_survives_a_reading() -> None:
    module = network().train()
    loss = module(inputs()).square().sum()
    ModuleSuspect(module).query(inputs(3))
    ModuleSuspect(module).vjp(inputs(3), torch.ones(3, 3))
    loss.backward()
    assert all(p.grad is not None for p in module.parameters())


def test_the_gradient_is_that_of_finite_differences() -> None:
    module, x, v = network().double(), inputs(4, torch.float64), torch.randn(4, 3, dtype=torch.float64)
    grad = ModuleSuspect(module, batch_size=3).vjp(x, v)
    assert grad.shape == x.shape and grad.dtype == torch.float32
    module.eval()
    d = torch.randn_like(x)
    with torch.no_grad():
        slope = ((module(x + 1e-6 * d) - module(x - 1e-6 * d)) * v).flatten(1).sum(1) / 2e-6
    torch.testing.assert_close((grad * d).flatten(1).sum(1), slope, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("outer", [torch.no_grad, torch.inference_mode])
def test_it_works_where_gradients_are_off(outer: Any) -> None:
    module = network()
    expected = ModuleSuspect(module).vjp(inputs(), torch.ones(5, 3))
    with outer():
        x, v = inputs() + 0, torch.ones(5, 3)
        grad, scores = ModuleSuspect(module).vjp(x, v), ModuleSuspect(module).query(x)
    torch.testing.assert_close(grad, expected)
    assert not scores.is_inference() and not grad.is_inference()


@pytest.mark.parametrize(
    "wrap",
    [lambda s: (s, s), lambda s: [s], Output, lambda s: {"logits": s}],
    ids=["tuple", "list", "object", "dict"],
)
def test_wrapped_scores_are_found(wrap: Any) -> None:
    plain, wrapped = ModuleSuspect(network()), ModuleSuspect(Returning(wrap))
    assert torch.equal(plain.query(inputs()), wrapped.query(inputs()))
    assert torch.equal(plain.vjp(inputs(), torch.ones(5, 3)), wrapped.vjp(inputs(), torch.ones(5, 3)))


@pytest.mark.parametrize(
    ("wrap", "words"),
    [
        (lambda s: s * float("nan"), "aren't finite"),
        (lambda s: s[0], "wrong shape"),
        (lambda s: s[:2], "wrong shape"),
        (lambda s: s.flatten(), "wrong shape"),
        (lambda s: s[:, :0], "wrong shape"),
        (lambda s: "cat", "no class scores"),
        (lambda s: None, "no class scores"),
        (lambda s: torch.complex(s, s), "no class scores"),
    ],
)
def test_nonsense_is_refused(wrap: Any, words: str) -> None:
    with pytest.raises(ModelError, match=words):
        ModuleSuspect(Returning(wrap)).query(inputs())
    with pytest.raises(ModelError, match=words):
        ModuleSuspect(Returning(wrap)).vjp(inputs(), torch.ones(5, 3))


@pytest.mark.parametrize(
    "wrap",
    [lambda s: s.detach(), lambda s: s.argmax(1, keepdim=True).float(), lambda s: torch.zeros(len(s), 3)],
)
def test_scores_without_a_gradient_are_refused(wrap: Any) -> None:
    with pytest.raises(ModelError, match=r"no input gradient.*--access black"):
        ModuleSuspect(Returning(wrap)).vjp(inputs(), torch.ones(5, wrap(torch.zeros(5, 3)).shape[1]))


def test_scores_that_ignore_the_input_are_refused() -> None:
    class Constant(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.row = nn.Parameter(torch.ones(3))

        def forward(self, x: Tensor) -> Tensor:
            return self.row.expand(len(x), 3)

    with pytest.raises(ModelError, match="no input gradient"):
        ModuleSuspect(Constant()).vjp(inputs(), torch.ones(5, 3))


def test_bad_requests_are_refused() -> None:
    suspect = ModuleSuspect(network())
    with pytest.raises(DataError, match="asked nothing"):
        suspect.query(inputs(0))
    with pytest.raises(DataError, match="aren't finite"):
        suspect.query(inputs() / 0)
    with pytest.raises(ModelError, match="don't fit"):
        suspect.vjp(inputs(), torch.ones(4, 3))
    with pytest.raises(ModelError, match="2 weights for 3 classes"):
        suspect.vjp(inputs(), torch.ones(5, 2))
    with pytest.raises(ModelError, match="fails on inputs of shape"):
        suspect.query(torch.rand(2, 7))


def test_the_digest_is_of_names_types_shapes_and_bytes() -> None:
    assert weights_digest(network()) == weights_digest(network())
    others = [network(1), network().double(), network().bfloat16(), nn.Sequential(network())]
    assert len({weights_digest(m) for m in [network(), *others]}) == 5


@pytest.mark.parametrize("answer", [lambda x: x, lambda x: x.numpy(), lambda x: x.tolist()])
def test_a_function_may_answer_in_any_form(answer: Any) -> None:
    x = torch.rand(5, 3)
    assert torch.equal(CallableSuspect(answer, name="f", batch_size=2).query(x), x)


def test_a_function_is_checked_and_cannot_write_into_the_inputs() -> None:
    x, before = torch.rand(5, 3), None
    before = x.clone()
    CallableSuspect(lambda t: t.zero_(), name="f").query(x)
    assert torch.equal(x, before)
    classes = iter([3, 2])
    with pytest.raises(ModelError, match="changed its number of classes"):
        CallableSuspect(lambda t: np.zeros((len(t), next(classes))), name="f", batch_size=4).query(x)
    with pytest.raises(ModelError, match=r"f fails on inputs.*ZeroDivisionError"):
        CallableSuspect(lambda t: 1 / 0, name="f").query(x)


@pytest.mark.parametrize("out", [[[1.0, 2.0], [3.0]], [["a", "b"]], [[None, 1.0]], {"a": 1}])
def test_ragged_and_textual_answers_are_refused(out: Any) -> None:
    with pytest.raises(ModelError, match="no class scores"):
        check_scores(out, len(out))
