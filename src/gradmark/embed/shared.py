"""The task's own batch: which inputs can carry a penalty, and which parts can read its forward pass.

A part that asks nothing but ordinary inputs (wrong-class contrasts) needs no forward pass of its own: the
task's answers to its batch are what it reads, dropout and batch statistics included. It then rides on
the whole batch and adds a product of small matrices to the step.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from gradmark.embed.ranks import Ranks
from gradmark.errors import UsageError
from gradmark.protocols import Batch, Choosy
from gradmark.scores import wide
from gradmark.views import View


def shared(scores: Tensor | None, batch: Batch, model: nn.Module, ranks: Ranks) -> Batch | None:
    """Scores (b, C) and labels (b,) that the penalty may read; None where it has to ask for itself.

    Several processes keep one running state only if all see the same scores, and a task of another
    kind has no class scores: both ask. Raises UsageError where ``scores`` don't belong to the batch.
    """
    if scores is None or ranks.size > 1 or isinstance(model, View):
        return None
    if scores.ndim != 2 or len(scores) != len(batch[1]) or not scores.requires_grad:
        raise UsageError(
            "The scores aren't what the model says of the batch",
            expected=f"class scores ({len(batch[1])}, C) with their graph",
            found=f"{tuple(scores.shape)}, requires_grad={scores.requires_grad}",
            fix="Give the output of the task's own forward pass, not detached",
        )
    return wide(scores), batch[1]


def from_scores(scheme: Any) -> tuple[int, ...]:
    """Numbers of the scheme's parts that read natural inputs' scores as they are."""
    parts = getattr(scheme, "parts", (scheme,))
    return tuple(i for i, part in enumerate(parts) if hasattr(part, "signed"))


def rides(scheme: Any, mark: Any, labels: Tensor) -> bool:
    """Whether any of the inputs with these labels (b,) can carry the penalty."""
    if isinstance(scheme, Choosy) and len(labels):
        return bool(scheme.carrying(mark, labels).any())
    return len(labels) > 0
