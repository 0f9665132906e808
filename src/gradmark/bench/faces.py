"""ORL faces in three splits of the people: an embedding network, judged on people whom no training saw."""

from __future__ import annotations

from gradmark.bench.experiment import Experiment, Marking, Means, blends
from gradmark.embed import Recipe
from gradmark.tasks.faces import Faces, other

MARKER = {"budget": 1.5, "margin": 0.3, "target_log10_p": -25.0, "carriers": 40, "every": 1}


def experiment(fold: int = 0) -> Experiment:
    """12 epochs from scratch. Settings were chosen on fold 100."""
    marking = Marking({"bits": 128, "step": 0.06}, MARKER)
    return Experiment(
        task=Faces(fold, name=f"faces-{fold}" if fold else "faces"),
        other=other,
        recipe=Recipe(epochs=12, batch_size=60, augment="shift"),
        surrogate=blends,
        marking=Marking({}, MARKER),
        markings={"filter-gradient": marking},
        means=Means(lr=0.01, augment="shift"),
        surrogates=300,
    )


def fold1() -> Experiment:
    return experiment(1)


def fold2() -> Experiment:
    return experiment(2)


def fold3() -> Experiment:
    return experiment(3)
