"""Side effects: what the marked model does worse, or better, than its control on the same inputs.

Both answer the very same (spoilt) inputs, and differences are resampled in pairs: the interval holds the
luck of the inputs, not that of the training. A second control shows how much of the latter there is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from gradmark.audit.measure import percentiles, resampling
from gradmark.audit.robust import RADII, SEVERITIES, corrupted, corruptions, pgd, unit
from gradmark.protocols import Batch, BlackBox, ModelSpec, WhiteBox
from gradmark.scores import log_scores

BINS = 15
_DUST = 1e-6  # of float32's rounding


@dataclass(frozen=True)
class Effect:
    """One measure of both: ``difference`` is model minus control, with its paired 95 % interval.

    ``kind``: accuracy, class, attack, corruption or calibration; ``level``: class, radius or severity.
    ``worse``: the interval excludes zero on the harmful side.
    """

    name: str
    kind: str
    model: float
    control: float
    difference: float
    low: float
    high: float
    worse: bool
    n: int
    level: float | None = None

    def to_json(self) -> dict[str, Any]:
        return {k: round(v, 6) if isinstance(v, float) else v for k, v in asdict(self).items()}


def side_effects(
    model: BlackBox, control: BlackBox, data: Batch, spec: ModelSpec, generator: torch.Generator,
    attacked: int = 256,
) -> tuple[list[Effect], dict[str, Any]]:  # fmt: skip
    """Everything measured on ``data``; PGD on the first ``attacked`` inputs, where both have gradients."""
    x, labels = data
    answers = [s.query(x) for s in (model, control)]
    p = [log_scores(a, a.shape[1]).softmax(1).float() for a in answers]
    right = [(v.argmax(1) == labels).float() for v in p]
    weights = resampling(len(x), generator)
    found = [_share("accuracy", "accuracy", right, weights)]
    found += _calibration(p, right, labels, weights)
    for c in labels.unique().tolist():
        mine = labels == c
        rows = resampling(int(mine.sum()), generator)
        found.append(_share(f"class {c}", "class", [v[mine] for v in right], rows, c))
    if isinstance(model, WhiteBox) and isinstance(control, WhiteBox):
        few = x[:attacked], labels[:attacked]
        rows = resampling(len(few[0]), generator)
        for radius in RADII:
            state = generator.get_state()
            safe = []
            for suspect in (model, control):  # both get the same start
                generator.set_state(state)
                safe.append(pgd(suspect, few, spec, radius * unit(spec, x), generator).float())
            found.append(_share(f"PGD, radius {radius:g}", "attack", safe, rows, radius))
    for name, corruption in corruptions(spec, x).items():
        for severity in SEVERITIES:
            spoilt = corrupted(spec, x, corruption, severity, generator)
            pair = [(s.query(spoilt).argmax(1) == labels).float() for s in (model, control)]
            found.append(_share(f"{name} {severity}", "corruption", pair, weights, severity))
    confidence = [v.amax(1) for v in p]
    shown = {
        "confidence": confidence,
        "reliability": [_reliability(*v) for v in zip(confidence, right, strict=True)],
    }
    return found, shown


def _share(
    name: str, kind: str, pair: Sequence[Tensor], weights: Tensor, level: float | None = None
) -> Effect:
    """A share of inputs that are right, model's and control's (n,): higher is better."""
    model, control = pair
    difference = percentiles(weights @ (model - control))
    return Effect(
        name, kind, float(model.mean()), float(control.mean()), difference.value, difference.low,
        difference.high, difference.high < -_DUST, len(model), level,
    )  # fmt: skip


def _calibration(p: list[Tensor], right: list[Tensor], labels: Tensor, weights: Tensor) -> list[Effect]:
    """Expected calibration error (15 bins of equal width), mean confidence and negative log-likelihood."""
    errors = [ece(v.amax(1), r, weights) for v, r in zip(p, right, strict=True)]
    losses = [weights @ -v.gather(1, labels[:, None]).clamp_min(1e-12).log()[:, 0] for v in p]
    sure = [weights @ v.amax(1) for v in p]
    named = (
        ("calibration error (ECE)", errors),
        ("negative log-likelihood", losses),
        ("mean confidence", sure),
    )
    found = []
    for name, (a, b) in named:
        difference = percentiles(a - b)
        found.append(
            Effect(name, "calibration", float(a[0]), float(b[0]), difference.value, difference.low,
                   difference.high, difference.low > _DUST and name != "mean confidence", len(labels))
        )  # fmt: skip
    return found


def ece(confidence: Tensor, right: Tensor, weights: Tensor) -> Tensor:
    """Expected calibration error (B,) for each row of ``weights`` (B, n) (Guo et al., ICML 2017)."""
    gap = torch.zeros(len(confidence), BINS)
    place = (confidence * BINS).long().clamp(0, BINS - 1)
    gap[torch.arange(len(confidence)), place] = right - confidence
    return (weights @ gap).abs().sum(1)


def _reliability(confidence: Tensor, right: Tensor) -> list[tuple[float, float, int]]:
    """(mean confidence, accuracy, inputs) of every bin that holds any."""
    place = (confidence * BINS).long().clamp(0, BINS - 1)
    held = [place == b for b in range(BINS)]
    return [
        (float(confidence[h].mean()), float(right[h].mean()), int(h.sum())) for h in held if bool(h.any())
    ]
