"""Logits, probabilities and rounded probabilities as one thing."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from gradmark.errors import MismatchError
from gradmark.scores import log_scores, probabilities


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


def test_another_number_of_classes_is_refused() -> None:
    with pytest.raises(MismatchError, match="10 classes"):
        log_scores(soft(classes=7), 10)
