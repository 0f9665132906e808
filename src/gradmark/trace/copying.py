"""Making a licensee's copy: a short fine-tune that moves the base only along the licensee's bits."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradmark.embed import Marker, MarkStatus
from gradmark.embed.modes import penalty_mode
from gradmark.protocols import Batch
from gradmark.scores import wide
from gradmark.suspects.checks import unwrap
from gradmark.trace.codebook import Fingerprint
from gradmark.trace.marks import Tracing

ANCHOR = 5.0
"""Weight of the divergence from the base's answers, against 1 for the labels' loss."""
STRENGTH = 1.0


class Copying:
    """Rides in a training like a :class:`Marker`, and holds the copy to the base's answers besides.

    ``anchor`` times the Kullback-Leibler divergence of the copy's answers from the ``base``'s on the batch
    keeps accuracy, and the base mark with it; the ``marker`` places the licensee's bits.
    """

    def __init__(self, marker: Marker, base: nn.Module, anchor: float = ANCHOR) -> None:
        self.marker, self.anchor = marker, anchor
        self._base = copy.deepcopy(base).eval().requires_grad_(False)

    def penalty(self, model: nn.Module, batch: Batch) -> Tensor:
        """Scalar to add to the labels' loss of ``batch``."""
        x, _ = batch
        with torch.no_grad():
            told = wide(unwrap(self._base(x))).log_softmax(1)
        with penalty_mode(model):
            given = wide(unwrap(model(x))).log_softmax(1)
        away = F.kl_div(given, told, reduction="batchmean", log_target=True)
        return self.marker.penalty(model, batch) + self.anchor * away

    def status(self) -> MarkStatus:
        return self.marker.status()

    def state_dict(self) -> dict[str, Any]:
        return self.marker.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.marker.load_state_dict(state)


def copying(
    tracing: Tracing,
    licensee: str,
    base: nn.Module,
    *,
    anchor: float = ANCHOR,
    strength: float = STRENGTH,
    margin: float = 1.0,
    method: str = "auto",
    seed: int = 0,
) -> Copying:
    """What rides in the fine-tune of ``licensee``'s copy of ``base``."""
    marker = Marker(
        Fingerprint(tracing.probes, licensee), tracing.key, tracing.spec, strength=strength, margin=margin,
        carriers=64, every=1, method=method, test="sign-flip", seed=seed,
    )  # fmt: skip
    return Copying(marker, base, anchor)
