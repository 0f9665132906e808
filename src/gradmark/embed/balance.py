"""How heavily the mark pushes: its gradient's norm follows the task's at a stated ratio."""

from __future__ import annotations

from dataclasses import dataclass

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

        ``reached``: whether the evidence passes the target; None on the first call.
        """
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
