"""Lightning Fabric: the marker under its precision, looking at the module inside its wrapper.

model, optimizer = fabric.setup(model, optimizer)
marker = FabricMarker(fabric, marker)
loss = F.cross_entropy(model(x), y) + marker.penalty(model, (x, y))
fabric.backward(loss)
fabric.save("checkpoint.pt", {"model": model, "optimizer": optimizer, "marker": marker})
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from gradmark.embed import Marker, MarkStatus
from gradmark.errors import UsageError
from gradmark.protocols import Batch

try:
    from lightning.fabric import Fabric
    from lightning.fabric.wrappers import _FabricModule
except ImportError as cause:
    raise UsageError("Fabric needs lightning", fix="pip install 'gradmark[lightning]'") from cause


class FabricMarker:
    """``marker`` inside ``fabric``. Has a state of its own, so it can be an entry of ``fabric.save``."""

    def __init__(self, fabric: Fabric, marker: Marker) -> None:
        self.fabric, self.marker = fabric, marker

    def penalty(self, model: nn.Module, batch: Batch, scores: Tensor | None = None) -> Tensor:
        """As :meth:`gradmark.Marker.penalty`, under Fabric's precision; ``model`` as ``setup`` gave it."""
        inner = model._forward_module if isinstance(model, _FabricModule) else model
        with self.fabric.autocast():
            return self.marker.penalty(inner, batch, scores)

    def soft_labels(self, batch: Batch, smoothing: float = 0.1) -> Tensor:
        """As :meth:`gradmark.Marker.soft_labels`."""
        return self.marker.soft_labels(batch, smoothing)

    def status(self) -> MarkStatus:
        return self.marker.status()

    def state_dict(self) -> dict[str, Any]:
        return self.marker.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.marker.load_state_dict(state)
