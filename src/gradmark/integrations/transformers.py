"""Hugging Face's Trainer: ``MarkedTrainer(marker=marker, model=model, args=args, ...)``.

The penalty joins ``compute_loss``, the one place that sees model, inputs and loss before backward, on
training batches alone. Under gradient accumulation it weighs what it would in a plain loop that divides
the sum of both losses by the number of batches: where the Trainer has normalised the task's loss over all
of them already, the penalty is divided here.
"""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from gradmark.embed import Marker
from gradmark.embed.wrappers import bare
from gradmark.errors import UsageError
from gradmark.integrations.state import load_marker, save_marker
from gradmark.suspects.checks import unwrap

try:
    from transformers import Trainer, TrainerCallback
    from transformers.trainer_utils import get_last_checkpoint
except ImportError as cause:
    raise UsageError("The Trainer needs transformers", fix="pip install 'gradmark[transformers]'") from cause


class MarkedTrainerMixin:
    """For a Trainer of your own: ``class MyMarked(MarkedTrainerMixin, MyTrainer)``.

    ``marker``: carries the mark. ``mark_input``: name of the float inputs (b, *shape) in a batch that the
    marker's spec speaks of, as the model's ``forward`` calls them; ``mark_labels`` likewise, labels (b,).
    Checkpoints hold the marker's state, and ``train(resume_from_checkpoint=...)`` takes it up. A marker with
    ``keyed_labels`` spreads the ``label_smoothing_factor`` of the Trainer's arguments, and its cross-entropy
    stands for the Trainer's own loss.
    """

    def __init__(
        self,
        *args: Any,
        marker: Marker,
        mark_input: str = "pixel_values",
        mark_labels: str = "labels",
        **more: Any,
    ) -> None:
        super().__init__(*args, **more)
        self.marker, self.mark_input, self.mark_labels = marker, mark_input, mark_labels
        self.add_callback(_Saved(marker))  # type: ignore[attr-defined]

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, *args: Any, **more: Any
    ) -> Any:
        """The Trainer's own loss, and the penalty where the model is training."""
        try:
            batch = (inputs[self.mark_input], inputs[self.mark_labels])  # the Trainer may pop them
        except KeyError as cause:
            raise UsageError(
                "The batch lacks what carries the mark",
                expected=f"{self.mark_input} and {self.mark_labels}",
                found=", ".join(inputs),
                fix="Name them with mark_input and mark_labels",
            ) from cause
        if not model.training:
            return super().compute_loss(model, inputs, return_outputs, *args, **more)  # type: ignore[misc]
        loss, out = super().compute_loss(model, inputs, True, *args, **more)  # type: ignore[misc]
        penalty = self.marker.penalty(_taking(model, self.mark_input), batch)
        if labels := self.marker.labels:
            scores = unwrap(out).float()
            smoothing = self.args.label_smoothing_factor  # type: ignore[attr-defined]
            loss, penalty = 0.0, penalty + F.cross_entropy(scores, labels(batch, smoothing))
        counted = more.get("num_items_in_batch", args[0] if args else None)
        if self._normalised(counted):
            penalty = penalty / self.current_gradient_accumulation_steps  # type: ignore[attr-defined]
        return (loss + penalty, out) if return_outputs else loss + penalty

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **more: Any) -> Any:
        """As the Trainer's, with the marker's state."""
        place = resume_from_checkpoint
        if place is True:
            place = get_last_checkpoint(self.args.output_dir)  # type: ignore[attr-defined, no-untyped-call]
        if place:
            load_marker(self.marker, Path(place))
        return super().train(resume_from_checkpoint, *args, **more)  # type: ignore[misc]

    def _normalised(self, counted: Any) -> bool:
        """Whether the Trainer takes the loss as it is; by its own rule in ``training_step``."""
        if getattr(self, "loss_is_scaled_for_ga", None) is not None:
            return bool(self.loss_is_scaled_for_ga)  # type: ignore[attr-defined]
        by_model = self.model_accepts_loss_kwargs and counted is not None  # type: ignore[attr-defined]
        return bool(by_model or self.compute_loss_func is not None)  # type: ignore[attr-defined]


class MarkedTrainer(MarkedTrainerMixin, Trainer):
    """``transformers.Trainer`` that marks what it trains."""


class _Saved(TrainerCallback):
    def __init__(self, marker: Marker) -> None:
        self.marker = marker

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.is_world_process_zero:
            save_marker(self.marker, Path(args.output_dir) / f"checkpoint-{state.global_step}")


class _ByName(nn.Module):
    """A model whose inputs have a name that isn't its forward's first."""

    def __init__(self, model: nn.Module, name: str) -> None:
        super().__init__()
        self.model, self.name = model, name

    def forward(self, x: Tensor) -> Any:
        return self.model(**{self.name: x})


def _taking(model: nn.Module, name: str) -> nn.Module:
    """``model`` as a function of the input called ``name`` alone."""
    model = bare(model)
    parameters = list(inspect.signature(type(model).forward).parameters)  # self, then the inputs
    return model if parameters[1:2] == [name] else _ByName(model, name)
