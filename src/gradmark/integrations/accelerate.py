"""Hugging Face Accelerate: the marker in its precision, and in its checkpoints.

    accelerator = Accelerator(mixed_precision="bf16", gradient_accumulation_steps=4)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    marker = AccelerateMarker(accelerator, marker)
    for x, y in loader:
        with accelerator.accumulate(model):
            loss = F.cross_entropy(model(x), y) + marker.penalty(model, (x, y))
            accelerator.backward(loss)

``accelerator.backward`` divides by the accumulation steps, the penalty with the task's loss.
"""

from __future__ import annotations

from torch import Tensor, nn

from gradmark.embed import Marker, MarkStatus
from gradmark.errors import UsageError
from gradmark.protocols import Batch

try:
    from accelerate import Accelerator
except ImportError as cause:
    raise UsageError("This needs accelerate", fix="pip install 'gradmark[accelerate]'") from cause


class AccelerateMarker:
    """``marker`` inside ``accelerator``: ``save_state`` and ``load_state`` hold its state from now on.

    Give ``penalty`` the prepared model. A prepared model that is compiled, or wrapped in DDP or FSDP2, is
    fine; FSDP1 and DeepSpeed are refused by name (:func:`gradmark.embed.wrappers.refuse`).
    """

    def __init__(self, accelerator: Accelerator, marker: Marker) -> None:
        self.accelerator, self.marker = accelerator, marker
        accelerator.register_for_checkpointing(marker)

    def penalty(self, model: nn.Module, batch: Batch, scores: Tensor | None = None) -> Tensor:
        """As :meth:`gradmark.Marker.penalty`, under the accelerator's autocast."""
        with self.accelerator.autocast():
            return self.marker.penalty(model, batch, scores)

    def soft_labels(self, batch: Batch, smoothing: float = 0.1) -> Tensor:
        """As :meth:`gradmark.Marker.soft_labels`."""
        return self.marker.soft_labels(batch, smoothing)

    def status(self) -> MarkStatus:
        return self.marker.status()
