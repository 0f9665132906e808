"""Secret inputs with secret labels (Adi et al., USENIX Security 2018).

For each of ``bits`` keyed abstract inputs the key draws two classes, and the bit picks the one that
training teaches. Read from the scores at the triggers alone, so an API serves as well as the file.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from gradmark.codec import canonical_json
from gradmark.embed.modes import scores_beside
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
class Trigger:
    """``bits``: how many triggers. ``pattern``: ``smooth`` ones, or of the ``two-tone`` kind
    (:func:`gradmark.inputs.secret_inputs`), less like blurred and faded natural inputs."""

    bits: int = 64
    pattern: str = "smooth"

    name: ClassVar[str] = "trigger"
    needs: ClassVar[Access] = "black"
    reads: ClassVar[str] = "scores"

    def parameters(self) -> dict[str, Any]:
        # Marks made before there was another pattern keep their bytes.
        return {n: v for n, v in asdict(self).items() if (n, v) != ("pattern", "smooth")}

    def mark(self, key: OwnerKey, spec: ModelSpec) -> TriggerMark:
        """Derive triggers, classes and bits. Raises UsageError on impossible settings."""
        context = canonical_json(
            {"scheme": self.name, "parameters": self.parameters(), "spec": spec.to_json()}
        )
        return trigger_mark(key, spec, self.bits, context, self.pattern)

    def probe(
        self, mark: TriggerMark, model: nn.Module, batch: Batch, generator: torch.Generator, method: str
    ) -> tuple[Tensor, Tensor]:
        """Log-odds (m, 1) of the labels of as many random triggers as the batch has inputs.

        No gradient is read, so both methods are one. The batch only sets the batch norms' statistics.
        """
        index = some_triggers(mark, len(batch[0]), generator)
        scores = scores_beside(model, batch[0], mark.inputs[index].to(batch[0]))
        return log_odds(scores, mark.labels[index].to(scores.device))[:, None], index[:, None]

    def read(
        self, mark: TriggerMark, suspect: BlackBox, pool: Batch, *, access: Access, carriers: int,
        queries: int = 0,
    ) -> Reading:  # fmt: skip
        """Read the triggers; ``pool`` and ``carriers`` are not used."""
        return read_triggers(mark, suspect, access, queries)

    def questions(self, mark: TriggerMark, pool: Batch, carriers: int) -> tuple[Questions, ...]:
        """One question a trigger; ``pool`` and ``carriers`` are not used."""
        return trigger_questions(mark)
