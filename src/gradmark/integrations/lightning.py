"""Lightning: ``Trainer(callbacks=[MarkCallback(marker)])``, and nothing else changes.

The callback adds the penalty to what ``training_step`` returns, before Lightning divides it by the
accumulation steps, scales it and runs backward. Validation and test are left alone: they may run in
inference mode, where nothing has a gradient. Checkpoints hold the marker's state.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn

from gradmark.embed import Marker
from gradmark.errors import UsageError
from gradmark.protocols import Batch

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
except ImportError as cause:
    raise UsageError("The callback needs lightning", fix="pip install 'gradmark[lightning]'") from cause


def _as_pair(batch: Any) -> Batch:
    return batch[0], batch[1]


class MarkCallback(Callback):
    """Marks the module that a Lightning Trainer fits.

    ``batch_of`` maps a training batch to inputs (b, *shape) and labels (b,); by default its first two
    items. ``network`` maps the LightningModule to the network whose scores carry the mark; by default
    the module's own ``forward``. Automatic optimisation only.
    """

    def __init__(
        self,
        marker: Marker,
        *,
        batch_of: Callable[[Any], Batch] = _as_pair,
        network: Callable[[LightningModule], nn.Module] | None = None,
    ) -> None:
        self.marker, self.batch_of, self.network = marker, batch_of, network

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Put the penalty into the module's training step, for this fit."""
        if stage != "fit":
            return
        if not pl_module.automatic_optimization:
            raise UsageError(
                "The callback can't see the loss of manual optimisation",
                fix="Add marker.penalty(self, batch) to the loss in training_step",
            )
        step = pl_module.training_step

        def marked(batch: Any, *args: Any, **more: Any) -> Any:
            found = step(batch, *args, **more)
            if found is None:
                return None
            with _alone(pl_module):
                network = pl_module if self.network is None else self.network(pl_module)
                penalty = self.marker.penalty(network, self.batch_of(batch))
            if isinstance(found, Mapping):
                return {**found, "loss": found["loss"] + penalty}
            return found + penalty

        pl_module.training_step = marked  # type: ignore[method-assign]

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Give the module its own training step back."""
        if stage == "fit":
            vars(pl_module).pop("training_step", None)

    def state_dict(self) -> dict[str, Any]:
        return self.marker.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.marker.load_state_dict(state_dict)


@contextmanager
def _alone(module: LightningModule) -> Iterator[None]:
    """The module without its Trainer, which the preflight's copy would take along, and without logging."""
    trainer = module._trainer
    module._trainer = None
    try:
        yield
    finally:
        module._trainer = trainer
