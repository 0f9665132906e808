"""Both trigger schemes: labels, label-only answers, the ball; batch norms beside natural inputs."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from conformance import CLASSES, KEY, SPECS, Counting, inputs, network
from gradmark.embed.modes import penalty_mode, scores_beside
from gradmark.errors import UsageError
from gradmark.schemes.margin_trigger import MarginTrigger
from gradmark.schemes.trigger import Trigger
from gradmark.triggers import log_odds

SPEC = SPECS["colour"]


def test_a_label_only_api_gives_one_of_two_numbers_or_a_tie() -> None:
    scheme = Trigger(bits=16)
    mark = scheme.mark(KEY, SPEC)
    answers = mark.labels.clone()
    answers[3:] = mark.pairs[3:].sum(1) - mark.labels[3:]  # the other class of the pair
    answers[9] = next(c for c in range(CLASSES) if c not in mark.pairs[9].tolist())

    def api(x: Tensor) -> Tensor:
        return nn.functional.one_hot(answers[: len(x)], CLASSES).float()

    for budget, known in ((10**6, 16), (5, 5)):
        reading = scheme.read(
            mark, Counting(api), inputs("colour", 4, 0), access="black", carriers=1, queries=budget
        )
        signed = reading.values * reading.bits
        expected = torch.tensor([1.0] * 3 + [-1.0] * 13)
        expected[9] = 0
        expected[known:] = 0
        assert torch.equal(signed.sign().float(), expected)
        assert reading.queries == known
    assert bool((mark.pairs[:, 0] != mark.pairs[:, 1]).all())
    assert torch.equal(mark.inputs, SPEC.snap(mark.inputs))


def test_log_odds() -> None:
    scores = torch.tensor([[1.0, 2.0, 0.5]])
    p = scores.softmax(1)[0, 1]
    torch.testing.assert_close(log_odds(scores, torch.tensor([1])), (p / (1 - p)).log()[None])


def test_the_margin_is_asked_for_at_the_worst_input_in_the_ball() -> None:
    model, batch = network("colour"), inputs("colour", 64, seed=0)
    near, far = (MarginTrigger(radius=r) for r in (1e-6, 0.1))
    plain, wide = (
        s.probe(s.mark(KEY, SPEC), model, batch, torch.Generator().manual_seed(0), "exact")[0]
        for s in (near, far)
    )
    mark = far.mark(KEY, SPEC)
    worst = far._worst(mark, model, batch[0], mark.inputs, mark.labels)
    assert float((worst - mark.inputs).abs().max()) <= 0.1 + 1e-6
    before, after = (log_odds(model(x), mark.labels) for x in (mark.inputs, worst))
    assert bool((after < before).all())
    assert plain.shape == wide.shape == (64, 1)
    with pytest.raises(UsageError):
        MarginTrigger(radius=0.0).mark(KEY, SPEC)


def test_batch_norms_take_natural_statistics_alone() -> None:
    """Like running statistics of momentum 1 over the natural inputs, biased variance aside."""
    body = network("colour")
    model = nn.Sequential(*body[:-1], nn.BatchNorm1d(64), body[-1]).train()
    natural, x = inputs("colour", 50, seed=0)[0], torch.rand(5, *SPEC.input_shape)
    twin, state = copy.deepcopy(model), copy.deepcopy(model.state_dict())
    with torch.no_grad():
        h = twin[:-2](natural)
        twin[-2].running_mean, twin[-2].running_var = h.mean(0), h.var(0, correction=0)
        with penalty_mode(model):
            found = scores_beside(model, natural, x)
        torch.testing.assert_close(found, twin.eval()(x), rtol=1e-4, atol=1e-5)
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
