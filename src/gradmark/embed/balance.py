"""How heavily the mark pushes: its gradient's norm follows the task's at a stated ratio."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

from gradmark.embed.wrappers import needs_whole_backward, norm_of, trainable, weight_gradients
from gradmark.errors import UsageError
from gradmark.protocols import Batch
from gradmark.suspects.checks import unwrap
from gradmark.views import View

_SMOOTH = 0.8
_FLOOR = 0.05  # of the largest task gradient seen: a memorised task must not silence the mark
_CEILING = 10.0  # on how far the weight may follow a penalty's gradient that its gates have closed
_LIGHTEST = 0.02
_HEAVIEST = 1e3


@dataclass
class Balance:
    """``weight``: the penalty's factor. ``push``: 1, and less while the evidence passes the target."""

    push: float = 1.0
    weight: float = 0.0
    task_norm: float = 0.0
    penalty_norm: float = 0.0
    task_peak: float = 0.0
    penalty_peak: float = 0.0

    def update(self, task: float, penalty: float, ratio: float, reached: bool | None) -> None:
        """Take in two gradient norms; ``ratio``: of the second to the first while the push is whole.

        ``reached``: whether the evidence passes the target; None on the first call. A norm that isn't finite,
        as where a loss in half precision overflows and its step is skipped, changes nothing.
        """
        if not (math.isfinite(task) and math.isfinite(penalty)):
            return
        smooth = 0.0 if reached is None else _SMOOTH
        self.task_norm = smooth * self.task_norm + (1 - smooth) * task
        self.penalty_norm = smooth * self.penalty_norm + (1 - smooth) * penalty
        self.task_peak = max(self.task_peak, self.task_norm)
        self.penalty_peak = max(self.penalty_peak, self.penalty_norm)
        if reached is not None:
            self.push = min(1.0, max(_LIGHTEST, self.push * (_SMOOTH if reached else 1 / _SMOOTH)))
        against = max(self.penalty_norm, self.penalty_peak / _CEILING, 1e-12)
        follows = max(self.task_norm, _FLOOR * self.task_peak) / against
        self.weight = min(ratio * self.push * follows, _HEAVIEST)


def check_strength(
    target_log10_p: float, budget: float, margin: float, carriers: int, every: int,
    strength: float | None, weight: float | None,
) -> None:  # fmt: skip
    """UsageError where a Marker's arguments of these names make no sense."""
    sizes = [budget, margin] if strength is None else [budget, margin, strength]
    good = all(0 < v < math.inf for v in sizes) and 0 <= (weight or 0.0) < math.inf
    if not target_log10_p < 0 or not good or carriers < 1 or every < 1:
        raise UsageError(
            "The strength of a mark makes no sense",
            expected="target_log10_p < 0; budget, margin, strength > 0 and weight >= 0, all finite; "
            "carriers, every >= 1",
            found=f"{target_log10_p=}, {budget=}, {margin=}, {carriers=}, {every=}, {strength=}, {weight=}",
        )


def norms(
    model: nn.Module, task_loss: Callable[[Tensor, Tensor], Tensor], loss: Tensor, norm: float | None,
    batch: Batch,
) -> tuple[float, float]:  # fmt: skip
    """Of the gradients of the task's loss of ``batch`` and of the penalty ``loss``, whose may be known."""
    weights = trainable(model)
    if isinstance(model, View):
        task = model.task.loss(model.model, batch)
    else:
        task = task_loss(unwrap(model(batch[0])), batch[1])
    whole = needs_whole_backward(model, task)
    of_task = norm_of(weight_gradients(task, weights, whole=whole))
    if norm is None:
        norm = norm_of(weight_gradients(loss, weights, whole=whole, retain=True))
    return of_task, norm
