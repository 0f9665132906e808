"""Attacks that change weights by a rule: what exactly they leave behind."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from conformance import SPECS, inputs, network, pool, white
from gradmark import catalog
from gradmark.errors import AttackError, UsageError
from gradmark.protocols import Thief
from gradmark.suspects.module import weights_digest
from gradmark.thief import last_layer

THIEF = Thief(SPECS["grey"], *inputs("grey", 120, seed=0), batch_size=40)


def attacked(name: str, model: nn.Module, thief: Thief = THIEF, **parameters: Any) -> nn.Module:
    return catalog.attack(name, parameters).run(model, thief, torch.Generator().manual_seed(0))


def weights(model: nn.Module) -> list[Tensor]:
    return [p.detach() for p in model.parameters() if p.ndim > 1]


@pytest.mark.parametrize("structured", [False, True])
def test_pruned_models_are_plain(structured: bool) -> None:
    model = network("grey")
    pruned = attacked("prune", model, structured=structured)
    assert list(pruned.state_dict()) == list(model.state_dict())
    assert [n for n, _ in pruned.named_parameters()] == [n for n, _ in model.named_parameters()]
    assert not any(part._forward_pre_hooks for part in pruned.modules())
    pruned.load_state_dict(model.state_dict())


def test_structured_pruning_takes_the_weakest_filters() -> None:
    model = network("grey")
    pruned = attacked("prune", model, structured=True, fraction=0.25)
    *body, head = weights(model)
    *left, same = weights(pruned)
    assert torch.equal(head, same)
    for old, new in zip(body, left, strict=True):
        gone = (new == 0).flatten(1).all(1)
        norms = old.flatten(1).norm(dim=1)
        assert int(gone.sum()) == len(old) // 4
        assert norms[gone].max() <= norms[~gone].min()
        assert torch.equal(old[~gone], new[~gone])


def test_tied_weights_stay_tied() -> None:
    model = nn.Sequential(nn.Linear(9, 9), nn.ReLU(), nn.Linear(9, 9))
    model[2].weight = model[0].weight
    pruned = attacked("prune", model)
    assert pruned[2].weight is pruned[0].weight
    assert float((pruned[0].weight == 0).double().mean()) == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize(("kind", "step"), [("fp8", 2**-4), ("bf16", 2**-8)])
def test_rounding_to_floats_of_few_bits(kind: str, step: float) -> None:
    model = network("grey")
    for old, new in zip(weights(model), weights(attacked("quantize", model, kind=kind)), strict=True):
        assert not torch.equal(old, new)
        normal = old.abs() > 1e-3 * old.abs().max()  # below, fp8 has no more digits to give
        assert float(((new - old).abs() / old.abs())[normal].max()) <= 1.001 * step
        if kind == "fp8":
            assert len(new.unique()) <= 2**8
            assert new.abs().max() == pytest.approx(old.abs().max())
        else:
            assert torch.equal(new, new.bfloat16().float())


@pytest.mark.parametrize("parameters", [{"kind": "int3"}, {"bits": 1}, {"bits": 17}])
def test_unknown_roundings_are_refused(parameters: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        attacked("quantize", network("grey"), **parameters)


@pytest.mark.parametrize("level", [0.0, 0.3])
def test_noise_is_relative_to_the_weights(level: float) -> None:
    model = network("grey")
    for old, new in zip(weights(model), weights(attacked("noise", model, level=level)), strict=True):
        assert float((new - old).std()) == pytest.approx(level * float(old.std()), rel=0.1)


def test_shifting_takes_away_what_filters_share() -> None:
    model = network("grey")
    (old, *rest), (new, *same) = (weights(m) for m in (model, attacked("weight-shift", model, epochs=0)))
    torch.testing.assert_close(new.mean(0), -0.5 * old.mean(0))
    assert all(torch.equal(a, b) for a, b in zip(rest, same, strict=True))
    noisy = weights(attacked("weight-shift", model, epochs=0, noise=1.0))[0]
    assert float((noisy - new).std()) == pytest.approx(float(old.std()), rel=0.2)


def test_shifting_without_convolutions_leaves_the_head() -> None:
    thief = Thief(SPECS["vector"], *inputs("vector", 40, seed=0))
    model = network("vector")
    (first, *_, head), (new, *_, same) = (
        weights(m) for m in (model, attacked("weight-shift", model, thief, strength=1.0, epochs=0))
    )
    torch.testing.assert_close(new.mean(0), torch.zeros(20), atol=1e-6, rtol=0)
    assert torch.equal(head, same)
    tuned = attacked("weight-shift", model, thief, strength=1.0)
    assert not torch.equal(weights(tuned)[-1], head)
    assert not torch.equal(first, new)


def normed(seed: int) -> nn.Sequential:
    body = network("grey", seed=seed)
    return nn.Sequential(*body[:-2], nn.BatchNorm1d(64), nn.ReLU(), nn.Dropout(0.5), body[-1])


def thief_with(sibling: nn.Module | None) -> Thief:
    return Thief(SPECS["grey"], THIEF.x, THIEF.labels, sibling=sibling, batch_size=40)


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_averaging_mixes_and_measures_again(share: float) -> None:
    ours, theirs = normed(0), normed(1)
    mixed = attacked("average", ours, thief_with(theirs), share=share)
    for a, b, c in zip(weights(ours), weights(theirs), weights(mixed), strict=True):
        torch.testing.assert_close(c, (1 - share) * a + share * b)
    with torch.no_grad():
        y = mixed[:5](THIEF.x)
    norm = mixed[5]
    assert isinstance(norm, nn.BatchNorm1d)
    torch.testing.assert_close(norm.running_mean, y.mean(0), rtol=1e-4, atol=1e-5)
    batch_share = 1 - (y.var(0) - norm.running_var).abs().mean() / y.var(0).mean()
    assert float(batch_share) > 0.9
    assert norm.momentum == 0.1
    assert not any(part.training for part in mixed.modules())


@pytest.mark.parametrize("sibling", [None, network("grey"), network("vector")])
def test_averaging_needs_a_twin(sibling: nn.Module | None) -> None:
    with pytest.raises(AttackError, match=r"second network|same architecture"):
        attacked("average", normed(0), thief_with(sibling))


def test_torchao_stores_integers() -> None:
    pytest.importorskip("torchao")
    model = network("grey")
    coarse = attacked("torchao-int8", model)
    kept, large = coarse[0].weight, coarse[4].weight
    assert torch.equal(kept, model[0].weight)
    assert type(large) is not nn.Parameter
    assert large.qdata.dtype == torch.int8
    unit = model[4].weight.detach().abs().amax(1, keepdim=True) / 127
    assert float(((large.dequantize() - model[4].weight).detach().abs() / unit).max()) < 0.6
    x, _ = pool("grey")
    a, b = white(model), white(coarse)
    v = torch.ones(len(x), 10)
    both = torch.stack([suspect.vjp(x, v).flatten() for suspect in (a, b)])
    assert float(torch.corrcoef(both)[0, 1]) > 0.99
    assert a.digest != b.digest
    assert b.digest == weights_digest(attacked("torchao-int8", model))


def test_torchao_needs_linear_layers() -> None:
    pytest.importorskip("torchao")
    with pytest.raises(AttackError, match="No linear layer"):
        attacked("torchao-int8", network("grey"), smallest=10**6)


def test_torchao_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "torchao.quantization", None)
    with pytest.raises(AttackError, match="pip install"):
        attacked("torchao-int8", network("grey"))


class Tied(nn.Module):
    """Two layers that are one, registered behind the head that is asked last."""

    def __init__(self) -> None:
        super().__init__()
        self.head, self.one, self.two = nn.Linear(20, 10), nn.Linear(20, 20), nn.Linear(20, 20)
        self.two.weight = self.one.weight

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.head(self.two(self.one(x)))
        return found


def test_tied_weights_are_averaged_once() -> None:
    ours, theirs = Tied(), Tied()
    thief = Thief(SPECS["vector"], *inputs("vector", 40, seed=0), sibling=theirs)
    mixed = attacked("average", ours, thief, share=0.5)
    torch.testing.assert_close(mixed.one.weight, (ours.one.weight + theirs.one.weight) / 2)


def test_the_head_is_what_answers_and_not_what_was_registered_last() -> None:
    model, thief = Tied(), Thief(SPECS["vector"], *inputs("vector", 60, seed=0))
    assert last_layer(model, thief) is model.head
    retrained = attacked("rtll", model, thief, epochs=1)
    assert torch.equal(retrained.one.weight, model.one.weight)
    assert not torch.equal(retrained.head.weight, model.head.weight)
    assert last_layer(nn.Sequential(model, nn.Softmax(1)), thief) is model.two, "nobody answers: the last one"
