"""Sign a perceptron on a table, and prove it from its weights and through its API.

python examples/domains/tabular.py [PICTURE.png]
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from gradmark import FilterGradient, Verdict, catalog
from gradmark.embed import Recipe
from shared_parts import proved


def draw(axes: Any, row: Tensor, nudged: Tensor) -> None:
    axes.step(range(len(row)), row, color="0.6", label="a row")
    axes.step(range(len(row)), nudged, color="C0", linewidth=0.8, label="nudged by the key")
    axes.set(xlabel="column", title="What the API is asked", ylim=(-0.05, 1.2))
    axes.legend(frameon=False, ncols=2, loc="upper center")


def main(out: Path = Path("tabular.png")) -> dict[str, Verdict]:
    task = catalog.task("tabular")  # 64 counts a row, ten classes; see docs/tasks.md for a task of your own
    apis = {"API of class scores": (task, lambda net: nn.Sequential(net, nn.Softmax(1)))}
    scheme = FilterGradient(bits=64, step=0.1)
    return proved(task, scheme, Recipe(epochs=10), out, draw, apis, carriers=64, every=1)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:2]))
