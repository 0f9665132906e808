"""Triggers with a margin (Kim et al., Margin-based Neural Network Watermarking, ICML 2023).

Like the triggers of Adi et al., but training teaches the label at the worst input that a few ascent
steps find in a ball around the trigger. So the decision boundary keeps away from the triggers, and a
student that copies the answers around them copies theirs too.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from gradmark.codec import canonical_json
from gradmark.embed.modes import scores_beside
from gradmark.errors import UsageError
from gradmark.keys import OwnerKey
from gradmark.protocols import Access, Batch, BlackBox, ModelSpec, Reading
from gradmark.questions import Questions
from gradmark.triggers import (
    TriggerMark,
    log_odds,
    read_triggers,
    some_triggers,
    trigger_mark,
    trigger_questions,
)


@dataclass(frozen=True)
class MarginTrigger:
    """``bits``: how many triggers. ``radius``: of the ball in the maximum norm, relative to the input's
    scale. ``ascent``: steps, each of two radii over their number."""

    bits: int = 64
    radius: float = 8 / 255
    ascent: int = 3

    name: ClassVar[str] = "margin-trigger"
    needs: ClassVar[Access] = "black"
    reads: ClassVar[str] = "scores"

    def parameters(self) -> dict[str, Any]:
        return asdict(self)

    def mark(self, key: OwnerKey, spec: ModelSpec) -> TriggerMark:
        """Derive triggers, classes and bits. Raises UsageError on impossible settings."""
        if self.radius <= 0 or self.ascent < 1:
            raise UsageError("A margin needs a radius and at least one ascent step", found=repr(self))
        context = canonical_json(
            {"scheme": self.name, "parameters": self.parameters(), "spec": spec.to_json()}
        )
        return trigger_mark(key, spec, self.bits, context)

    def probe(
        self, mark: TriggerMark, model: nn.Module, batch: Batch, generator: torch.Generator, method: str
    ) -> tuple[Tensor, Tensor]:
        """Log-odds (m, 1) of the labels at the worst inputs near random triggers.

        The ascent goes by the gradient's signs, so the inputs it finds stay where they are under a
        small change of the weights and the reading's derivative is the one at fixed inputs.
        """
        index = some_triggers(mark, len(batch[0]), generator)
        labels = mark.labels[index].to(batch[0].device)
        worst = self._worst(mark, model, batch[0], mark.inputs[index].to(batch[0]), labels)
        return log_odds(scores_beside(model, batch[0], worst), labels)[:, None], index[:, None]

    def _worst(
        self, mark: TriggerMark, model: nn.Module, natural: Tensor, x: Tensor, labels: Tensor
    ) -> Tensor:
        radius = self.radius * mark.spec.scale
        moved = x
        for _ in range(self.ascent):
            moved = moved.detach().requires_grad_()
            odds = log_odds(scores_beside(model, natural, moved), labels).sum()
            (slope,) = torch.autograd.grad(odds, moved)
            moved = moved.detach() - slope.sign() * (2 * radius / self.ascent)
            moved = torch.minimum(torch.maximum(moved, x - radius), x + radius)
            if mark.spec.low is not None or mark.spec.high is not None:
                moved = moved.clamp(mark.spec.low, mark.spec.high)
        return moved

    def read(
        self, mark: TriggerMark, suspect: BlackBox, pool: Batch, *, access: Access, carriers: int,
        queries: int = 0,
    ) -> Reading:  # fmt: skip
        """Read the triggers themselves; ``pool`` and ``carriers`` are not used."""
        return read_triggers(mark, suspect, access, queries)

    def questions(self, mark: TriggerMark, pool: Batch, carriers: int) -> tuple[Questions, ...]:
        """One question a trigger; ``pool`` and ``carriers`` are not used."""
        return trigger_questions(mark)
