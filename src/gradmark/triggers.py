"""What trigger schemes share: keyed inputs, each with two keyed classes of which the bit picks one."""

from __future__ import annotations

import io
import os
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gradmark.errors import UsageError
from gradmark.files import atomic_write
from gradmark.inputs import secret_inputs
from gradmark.keys import OwnerKey
from gradmark.protocols import Access, BlackBox, ModelSpec, Reading, Scheme
from gradmark.questions import Questions
from gradmark.scores import log_scores

_HISTORY = 12  # points on the curve of p against queries


@dataclass(frozen=True)
class TriggerMark:
    """The secrets of one key: never stored, never printed."""

    spec: ModelSpec
    bits: Tensor
    inputs: Tensor
    """(n, *shape): the triggers."""
    pairs: Tensor
    """(n, 2): two different classes; the first is the label where the bit is +1."""

    def __repr__(self) -> str:
        return f"TriggerMark({len(self.bits)} bits, {self.spec})"

    @property
    def labels(self) -> Tensor:
        """(n,) the class as which each trigger is to be taken."""
        return torch.where(self.bits > 0, self.pairs[:, 0], self.pairs[:, 1])


def trigger_mark(
    key: OwnerKey, spec: ModelSpec, n: int, context: bytes, pattern: str = "smooth"
) -> TriggerMark:
    """Derive triggers, pairs and bits. Raises UsageError on less than one trigger or two classes."""
    if n < 1 or spec.n_classes < 2:
        raise UsageError("A mark needs at least one trigger and two classes", found=f"{n}, {spec.n_classes}")
    first = torch.from_numpy(key.integers("classes", n, spec.n_classes, context=context))
    further = torch.from_numpy(key.integers("other classes", n, spec.n_classes - 1, context=context))
    pairs = torch.stack([first, (first + 1 + further) % spec.n_classes], 1)
    bits = torch.from_numpy(key.uniform_bits("bits", n, context=context)).float()
    inputs = secret_inputs(key, spec, n, purpose="triggers", context=context, pattern=pattern)
    return TriggerMark(spec, bits, inputs, pairs)


def read_triggers(mark: TriggerMark, suspect: BlackBox, access: Access, queries: int) -> Reading:
    """Log-score of each trigger's first class minus that of its second.

    One query a trigger; those beyond the budget read as ties. An API that answers with a label alone,
    as a one-hot row, gives one of two opposite numbers, or a tie where it names a third class.
    """
    n = len(mark.bits)
    asked = n if access == "white" else min(n, queries)
    values = torch.zeros(n, dtype=torch.float64)
    if asked:
        scores = log_scores(suspect.query(mark.inputs[:asked]), mark.spec.n_classes)
        both = scores.gather(1, mark.pairs[:asked])
        values[:asked] = both[:, 0] - both[:, 1]
    spent = 0 if access == "white" else asked
    stops = sorted({max(1, round(spent * t / _HISTORY)) for t in range(1, _HISTORY + 1)}) if spent else []
    history = tuple((stop, values * (torch.arange(n) < stop)) for stop in stops)
    return Reading(values, mark.bits.double(), asked, spent, access, history)


def trigger_questions(mark: TriggerMark) -> tuple[Questions, ...]:
    """A cell is a trigger, and can be asked once."""

    def read(scores: Tensor, cells: Tensor, numbers: Tensor) -> Tensor:
        both = scores[:, 0].gather(1, mark.pairs[cells])
        return both[:, :1] - both[:, 1:]

    return (Questions(mark.bits, 1, 1, (1,) * len(mark.bits), lambda c, _: mark.inputs[c : c + 1], read),)


def log_odds(scores: Tensor, labels: Tensor) -> Tensor:
    """Score (b,) of the label minus the log of the summed exponentials of all others: positive where
    the label has more than half of the probability."""
    own = scores.gather(1, labels[:, None])
    others = scores.masked_fill(torch.nn.functional.one_hot(labels, scores.shape[1]).bool(), -torch.inf)
    return (own - others.logsumexp(1, keepdim=True))[:, 0]


def some_triggers(mark: TriggerMark, n: int, generator: torch.Generator) -> Tensor:
    """Numbers (m,) of at most ``n`` triggers, drawn without replacement."""
    return torch.randperm(len(mark.bits), generator=generator)[:n]


@dataclass(frozen=True)
class Triggers:
    """Secret inputs (n, *shape) float32 as the model sees them, and the labels (n,) to teach. Secret both."""

    x: Tensor = field(repr=False)
    labels: Tensor = field(repr=False)
    spec: ModelSpec

    def arrays(self) -> dict[str, NDArray[np.generic]]:
        """``x`` and ``y`` as data files hold them: what can be had without loss of bytes is.

        8-bit images become uint8, (n, height, width) in grey and (n, height, width, channels) in colour;
        all else float32.
        """
        x, spec = self.x, self.spec
        if spec.domain == "image" and (spec.low, spec.high, spec.levels) == (0.0, 1.0, 255):
            pixels = (x * 255).round().to(torch.uint8)
            x = pixels[:, 0] if pixels.shape[1] == 1 else pixels.movedim(1, -1)
        return {"x": x.contiguous().numpy(), "y": self.labels.long().numpy()}

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a new ``.npz``, mode 0600: whoever has the triggers can unlearn them."""
        buffer = io.BytesIO()
        np.savez(buffer, **self.arrays())  # type: ignore[arg-type]
        atomic_write(path, buffer.getvalue(), mode=0o600)


def triggers_of(scheme: Scheme, key: OwnerKey, spec: ModelSpec) -> Triggers:
    """The triggers of ``scheme`` for a key and a spec; UsageError where it has none to export."""
    mark = scheme.mark(key, spec)
    if not isinstance(mark, TriggerMark):
        raise UsageError(
            "Only triggers can be exported as data",
            expected="the scheme trigger or margin-trigger",
            found=scheme.name,
            fix="Give --scheme trigger",
        )
    return Triggers(mark.inputs, mark.labels, spec)
