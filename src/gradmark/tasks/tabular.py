"""Tabular data, the small case: rows of 64 counts from 0 to 16 (UCI's optical digits) into a perceptron.

The keyed direction at a row is a keyed pattern over the columns (:mod:`gradmark.carriers`): columns have
meaning, so the pattern is the same for all rows. What is asked stays on the grid of counts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from gradmark.data import Data, Split, load_data
from gradmark.protocols import ModelSpec
from gradmark.views import Classification

COLUMNS, COUNTS, CLASSES = 64, 16, 10


def load() -> Data:
    """scikit-learn's digits as a table: 1,197 rows to train, 600 of other writers to test."""
    images = load_data("digits")
    spec = ModelSpec("vector", (COLUMNS,), CLASSES, 0.0, 1.0, COUNTS)
    train, test = (Split(s.x.flatten(1), s.y, spec) for s in (images.to_train(), images.test))
    return Data(train, test, spec)


def perceptron(width: int = 256) -> nn.Module:
    """Two hidden layers."""
    return nn.Sequential(
        nn.Linear(COLUMNS, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, CLASSES)
    )


@dataclass(frozen=True)
class Tabular(Classification):
    """A perceptron on rows of counts; its API gives class scores."""

    name: str = "tabular"
    load: Callable[[], Data] = load
    make: Callable[[], nn.Module] = perceptron
