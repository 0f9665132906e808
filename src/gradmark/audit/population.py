"""Detectors judged on many networks, marked and not: can one who trained such a population tell?

Every network is its own case, with a seed and, if marked, a key of its own. Features are those of
:mod:`gradmark.audit.weights` and :mod:`gradmark.audit.gradients`; the bits of no key enter.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from gradmark.audit import gradients, weights
from gradmark.audit.measure import auc_interval, discriminant
from gradmark.errors import UsageError
from gradmark.protocols import Batch, ModelSpec, Scheme
from gradmark.suspects import ModuleSuspect

Classify = Callable[[NDArray[np.float64], NDArray[np.bool_], NDArray[np.float64]], NDArray[np.float64]]
"""From features to learn from (n, f), which are marked (n,), and others' features (t, f), to scores (t,)."""
REPEATS = 10
FOLDS = 5


def features(
    network: nn.Module, scheme: Scheme, spec: ModelSpec, batch: Batch, unmarked: nn.Module | None = None
) -> dict[str, float]:
    """All that is looked at in one network, as named numbers; ``unmarked`` is one of the attacker's own."""
    found = {f"weights: {name}": value for name, value in weights.features(network).items()}
    seen = gradients.features(
        ModuleSuspect(network),
        gradients.without_secrets(scheme),
        spec,
        batch,
        None if unmarked is None else ModuleSuspect(unmarked),
    )
    return found | {f"gradients: {name}": value for name, value in seen.items()}


def judge_population(
    rows: Sequence[Mapping[str, float]], marked: Sequence[bool], generator: np.random.Generator
) -> list[dict[str, Any]]:
    """AUC with its 95 % interval for each single feature, and for classifiers on groups of them.

    ``rows``: features of each network. Classifiers are cross-validated (5 folds, 10 times; a network's
    score is the mean over times) and know nothing of the networks they score. A single feature's AUC
    below .5 means that marked networks have less of it: 1 - AUC is what an attacker who knows the
    direction gets, but choosing the best of many features after the fact overstates it.
    """
    truth = np.asarray(marked, dtype=bool)
    if len(rows) != len(truth) or min(truth.sum(), (~truth).sum()) < 2:
        raise UsageError("No population", expected="two or more networks of each kind", found=str(len(rows)))
    names = list(rows[0])
    table = np.array([[row[name] for name in names] for row in rows])
    found = [_row(name, "single feature", table[:, i], truth) for i, name in enumerate(names)]
    found.sort(key=lambda row: -abs(row["auc"] - 0.5))
    groups = {
        "weights": [i for i, n in enumerate(names) if n.startswith("weights")],
        "gradients": [i for i, n in enumerate(names) if n.startswith("gradients")],
        "everything": list(range(len(names))),
    }
    classifiers = []
    for group, chosen in groups.items():
        for name, classify in (
            (("classifier", _discriminant), ("best feature", _best_feature)) if chosen else ()
        ):
            scores = cross_validated(table[:, chosen], truth, generator, classify)
            classifiers.append(_row(f"{name} on {group}", "cross-validated", scores, truth))
    return [*classifiers, *found]


def cross_validated(
    table: NDArray[np.float64],
    truth: NDArray[np.bool_],
    generator: np.random.Generator,
    classify: Classify | None = None,
) -> NDArray[np.float64]:
    """Scores (n,) of each network by classifiers that never saw it, on one scale.

    Each fold has equal shares of both kinds, as far as possible. Each classifier's scale is set by the
    networks it was taught with: 0 the mean of the unmarked, 1 that of the marked.
    """
    folds = max(2, min(FOLDS, int(truth.sum()), int((~truth).sum())))
    total = np.zeros(len(truth))
    for _ in range(REPEATS):
        fold = np.empty(len(truth), dtype=int)
        for kind in (truth, ~truth):
            fold[kind] = generator.permutation(np.arange(int(kind.sum())) % folds)
        for f in range(folds):
            out = fold == f
            scores = (classify or _discriminant)(table[~out], truth[~out], table)
            low, high = scores[~out & ~truth].mean(), scores[~out & truth].mean()
            total[out] += (scores[out] - low) / max(high - low, 1e-12)
    return total / REPEATS


def _discriminant(
    train: NDArray[np.float64], truth: NDArray[np.bool_], test: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Shrunk far: there are more features than networks."""
    return discriminant(train, truth, test, ridge=1.0)


def _best_feature(
    train: NDArray[np.float64], truth: NDArray[np.bool_], test: NDArray[np.float64]
) -> NDArray[np.float64]:
    """The one feature that tells best in training: against a mark that shows in one place only."""
    shift = train[truth].mean(0) - train[~truth].mean(0)
    spread = np.sqrt(train[truth].var(0) + train[~truth].var(0)) + 1e-12
    best = int(np.argmax(np.abs(shift) / spread))
    scores: NDArray[np.float64] = test[:, best] * np.sign(shift[best])
    return scores


def _row(name: str, how: str, scores: NDArray[np.float64], truth: NDArray[np.bool_]) -> dict[str, Any]:
    found = auc_interval(scores[truth], scores[~truth])
    return {"name": name, "how": how, "access": "white", "auc": found.value, "low": found.low,
            "high": found.high, "n_marked": int(truth.sum()), "n_control": int((~truth).sum())}  # fmt: skip
