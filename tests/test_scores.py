"""Logits, probabilities and rounded probabilities as one thing."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from gradmark.errors import MismatchError
from gradmark.scores import bounded, log_scores, mean_by, probabilities


def soft(rows: int = 40, classes: int = 10, sharpness: float = 3.0) -> Tensor:
    generator = torch.Generator().manual_seed(classes)
    return (sharpness * torch.randn(rows, classes, generator=generator, dtype=torch.float64)).softmax(1)


@pytest.mark.parametrize("classes", [2, 10, 100])
@pytest.mark.parametrize("decimals", [1, 2, 3, 4, 5, 6])
def test_rounded_probabilities_stay_probabilities(classes: int, decimals: int) -> None:
    """Also as float32, which holds hardly any decimal exactly; zeros are floored at half a unit."""
    rounded = soft(classes=classes).round(decimals=decimals).float()
    assert probabilities(rounded) is not None
    logs = log_scores(rounded, classes)
    zeros = rounded == 0
    half = torch.tensor(0.5 * 10.0**-decimals, dtype=torch.float64).log()
    torch.testing.assert_close(logs[zeros], half.expand(int(zeros.sum())))
    torch.testing.assert_close(logs[~zeros], rounded[~zeros].double().log())


def test_probabilities_and_logits_differ_by_a_constant_per_row() -> None:
    logits = torch.randn(20, 10, dtype=torch.float64)
    shift = log_scores(logits, 10) - log_scores(logits.softmax(1).float(), 10)
    torch.testing.assert_close(shift, shift[:, :1].expand_as(shift), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "logits",
    [soft().log(), 2 * soft(), 0.1231 * torch.ones(5, 10), torch.tensor([[2.0, -1.0]])],
)
def test_logits_are_no_probabilities(logits: Tensor) -> None:
    assert probabilities(logits) is None
    assert torch.equal(log_scores(logits, logits.shape[1]), logits.double())


def test_nothing_becomes_infinite() -> None:
    certain = torch.eye(10)
    assert bool(torch.isfinite(log_scores(certain, 10)).all())
    floored = probabilities(torch.tensor([[1.0, 0.0]]))
    assert floored is not None
    assert float(floored.min()) > 0


def top(p: Tensor, k: int) -> Tensor:
    return p * torch.zeros_like(p).scatter_(1, p.topk(k, 1).indices, 1.0)


@pytest.mark.parametrize("k", [1, 2, 5])
def test_hidden_classes_rank_below_the_shown(k: int) -> None:
    """The largest classes alone, which sum to less than 1: a tenth of the row's last stands for others."""
    shown = top(soft().float(), k)
    assert probabilities(shown) is not None
    logs, hidden = log_scores(shown, 10), shown == 0
    last = logs.masked_fill(hidden, 1.0).amin(1, keepdim=True)
    least = torch.tensor(0.1, dtype=torch.float64).log()
    torch.testing.assert_close(logs[hidden], (last + least).expand_as(logs)[hidden])
    torch.testing.assert_close(logs[~hidden], shown.double()[~hidden].log())


def test_a_row_is_read_alike_beside_others() -> None:
    shown = top(soft().float(), 3)
    alone = torch.cat([log_scores(row[None], 10) for row in shown])
    assert torch.equal(alone, log_scores(shown, 10))


@pytest.mark.parametrize("level", [1e-3, 1e-2, 0.3])
def test_noise_that_is_cut_off_at_zero(level: float) -> None:
    noise = torch.randn(40, 10, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    noisy = (soft() + level * noise).clamp_min(0)
    noisy = (noisy / noisy.sum(1, keepdim=True)).float()
    assert bool((noisy == 0).any())
    assert probabilities(noisy) is not None
    assert bool(torch.isfinite(log_scores(noisy, 10)).all())
    raw = soft() + level * noise
    assert torch.equal(log_scores(raw, 10), raw)


@pytest.mark.parametrize("decimals", [1, 2, 3])
def test_decimals_cut_off_instead_of_rounded(decimals: int) -> None:
    unit = 10.0**-decimals
    cut = (((soft() / unit).floor()) * unit).float()
    assert probabilities(cut) is not None
    half = torch.tensor(0.5 * unit, dtype=torch.float64).log()
    assert bool((log_scores(cut, 10)[cut == 0] == half).all())


def test_one_hot_answers_have_one_decimal() -> None:
    logs = log_scores(torch.eye(10), 10)
    wanted = torch.full((10, 10), 0.05, dtype=torch.float64).fill_diagonal_(1.0).log()
    torch.testing.assert_close(logs, wanted)


@pytest.mark.parametrize("temperature", [0.05, 0.3, 30.0])
def test_a_temperature_scales_the_logits(temperature: float) -> None:
    logits = soft().log()
    p = (logits / temperature).softmax(1).float()
    logs = log_scores(p, 10)
    kept = p > 1e-29  # the floor
    wanted = (logits / temperature).log_softmax(1)
    torch.testing.assert_close(logs[kept], wanted[kept], atol=1e-4 * max(1, 1 / temperature), rtol=1e-4)


def test_tiny_logits_are_no_rounded_zeros() -> None:
    """Else an API could hide everything by a factor."""
    logits = 1e-8 * soft().float()
    assert probabilities(logits) is None
    assert log_scores(logits, 10).unique().numel() > 10


@pytest.mark.parametrize("scores", [torch.zeros(4, 10), torch.ones(4, 1), torch.zeros(1, 2)])
def test_scores_without_content_are_finite(scores: Tensor) -> None:
    assert bool(torch.isfinite(log_scores(scores, scores.shape[1])).all())
    floored = probabilities(scores)
    assert floored is None or float(floored.min()) > 0


def test_another_number_of_classes_is_refused() -> None:
    with pytest.raises(MismatchError, match="10 classes"):
        log_scores(soft(classes=7), 10)


def test_what_jumps_counts_for_little() -> None:
    values = torch.tensor([0.0, 0.1, -0.2, 0.3, -40.0, 0.0])
    assert bounded(values, 2.0).tolist() == pytest.approx([0.0, 0.1, -0.2, 0.3, -0.4, 0.0])
    assert torch.equal(bounded(torch.zeros(3), 2.0), torch.zeros(3))
    assert torch.equal(bounded(values, 1e9), values)


def test_means_of_rows_that_share_a_number() -> None:
    values = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 9.0]], dtype=torch.float64)
    found = mean_by(values, torch.tensor([2, 0, 2]), 3)
    assert found.tolist() == [[3.0, 4.0], [0.0, 0.0], [3.0, 5.5]]
