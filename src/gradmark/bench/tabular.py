"""Rows of counts and a perceptron: the smallest experiment."""

from __future__ import annotations

from torch import nn

from gradmark.bench.experiment import Experiment, Marking, Means, blends
from gradmark.embed import Recipe
from gradmark.tasks.tabular import CLASSES, COLUMNS, Tabular

LOCAL = {"carriers": 64, "every": 1, "budget": 0.5}


def other() -> nn.Module:
    """One wide hidden layer, another activation."""
    return nn.Sequential(nn.Linear(COLUMNS, 512), nn.GELU(), nn.Linear(512, CLASSES))


def experiment() -> Experiment:
    """25 epochs from scratch."""
    return Experiment(
        task=Tabular(),
        other=other,
        recipe=Recipe(epochs=25),
        surrogate=blends,
        marking=Marking({}, {"target_log10_p": -18.0, **LOCAL}),
        markings={
            "filter-gradient": Marking({"bits": 128, "step": 0.1}, {"target_log10_p": -18.0, **LOCAL}),
            "ensemble": Marking({"bits": 128, "step": 0.1}, LOCAL, {"smoothing": 0.1}),
        },
        means=Means(lr=0.01),
    )
