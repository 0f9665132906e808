"""A task of a second for the benchmark's tests, named as ``benched:experiment``."""

from __future__ import annotations

from dataclasses import replace

from gradmark.bench.digits import MARKER, textures
from gradmark.bench.experiment import Experiment, Marking
from gradmark.data import load_data
from gradmark.embed import Recipe
from gradmark.views import Classification
from tiny import net


def renamed() -> Experiment:
    """The same by a task that has a name of its own."""
    return replace(experiment(), task=Classification("mine", lambda: load_data("digits"), net))


def experiment() -> Experiment:
    """Two epochs on the digits; marked afterwards in two more."""
    marking = Marking({"bits": 32, "step": 0.1}, {**MARKER, "carriers": 16})
    return Experiment(
        task=Classification("benched:experiment", lambda: load_data("digits"), net),
        other=net,
        pretrain=Recipe(epochs=2),
        recipe=Recipe(epochs=2),
        surrogate=textures,
        marking=marking,
        markings={"filter-gradient": marking},
        siblings=2,
        surrogates=32,
    )
