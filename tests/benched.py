"""A task of a second for the benchmark's tests, named as ``benched:task``."""

from __future__ import annotations

from gradmark.bench.digits import MARKER, textures
from gradmark.bench.task import Marking, Task
from gradmark.data import load_data
from gradmark.embed import Recipe
from tiny import net


def task() -> Task:
    """Two epochs on the digits; marked afterwards in two more."""
    marking = Marking({"bits": 32, "step": 0.1}, {**MARKER, "carriers": 16})
    return Task(
        name="benched:task",
        load=lambda: load_data("digits"),
        network=net,
        other=net,
        pretrain=Recipe(epochs=2),
        recipe=Recipe(epochs=2),
        domain="image",
        surrogate=textures,
        marking=marking,
        markings={"filter-gradient": marking},
        siblings=2,
        surrogates=32,
    )
