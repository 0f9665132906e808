"""A gradient mark made by other software: given directions and bits, read as its authors state.

A bit is read 1 where the mean over carriers of ``<direction, d cross_entropy / d input>`` is >= 0
(GradSigns, MLSys 2021, is of this kind). There is no key here: the p-value is valid only if the
arrays were fixed before the suspect existed.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gradmark.codec import sha256
from gradmark.errors import MarkFileError, MismatchError
from gradmark.files import read_arrays
from gradmark.protocols import Access, Batch, BlackBox, ModelSpec, Reading, WhiteBox
from gradmark.scores import log_scores, probabilities

_STEP = 8 / 255  # root-mean-square size of a black-box nudge, relative to the input's scale
_LARGEST = 1e30  # of a direction, so that readings stay finite
_CHUNK = 4096  # queries put together before they are sent


@dataclass(frozen=True)
class LinearMark:
    """``directions`` (n, *shape), ``bits`` (n,) of +1 and -1, ``target_class`` or None for all."""

    directions: Tensor
    bits: Tensor
    target_class: int | None
    digest: str

    name = "linear"

    @classmethod
    def load(cls, path: str | Path) -> LinearMark:
        """Read an ``.npz``. Raises MarkFileError where it isn't one or its arrays make no sense."""
        arrays = read_arrays(path, what="linear mark", error=MarkFileError)
        if not {"directions", "bits"} <= set(arrays):
            raise MarkFileError(
                f"{path} is no linear mark", expected="arrays directions, bits", found=", ".join(arrays)
            )
        directions, bits = arrays["directions"], arrays["bits"].ravel()
        numbers = directions.dtype.kind in "fiu" and bits.dtype.kind in "fiub"
        if not numbers or directions.ndim < 2 or len(directions) != len(bits) or not len(bits):
            raise MarkFileError(
                "The linear mark's arrays don't fit each other",
                expected="directions (n, *input shape) and bits (n,)",
                found=f"{directions.shape} and {arrays['bits'].shape}",
            )
        if not (np.abs(directions) < _LARGEST).all() or not np.isin(bits, (0, 1)).all():
            raise MarkFileError(
                "The linear mark's values make no sense", expected="finite directions, bits of 0 or 1"
            )
        target = arrays.get("target_class")
        if target is not None and (target.size != 1 or target.dtype.kind not in "iu"):
            raise MarkFileError(
                "target_class must be one class",
                expected="an integer",
                found=f"{target.dtype} {target.shape}",
            )
        return cls(
            torch.from_numpy(directions.astype(np.float32)),
            torch.from_numpy(2 * bits.astype(np.float64) - 1),
            None if target is None else int(target.reshape(-1)[0]),
            sha256(Path(path).read_bytes()),
        )

    def read(
        self, suspect: WhiteBox | BlackBox, pool: Batch, spec: ModelSpec, *, access: Access, queries: int = 0
    ) -> Reading:
        """White-box: all inputs (of the target class) at once. Black-box: two queries per nudge."""
        x, labels = pool
        if self.target_class is not None:
            x, labels = x[labels == self.target_class], labels[labels == self.target_class]
        if not len(x):
            raise MismatchError("No input is of the mark's target class", expected=str(self.target_class))
        if x.shape[1:] != self.directions.shape[1:]:
            raise MismatchError(
                "The data doesn't fit the linear mark",
                expected=f"inputs of shape {tuple(self.directions.shape[1:])}",
                found=str(tuple(x.shape[1:])),
            )
        if access == "white":
            if not isinstance(suspect, WhiteBox):
                raise MismatchError("White-box reading needs the model itself", found=suspect.name)
            return self._read_white(suspect, x, labels)
        return self._read_black(suspect, x, labels, spec, queries)

    def _read_white(self, suspect: WhiteBox, x: Tensor, labels: Tensor) -> Reading:
        scores = suspect.query(x)
        _check_labels(labels, scores.shape[1])
        truth = torch.nn.functional.one_hot(labels, scores.shape[1]).float()
        p = probabilities(scores)
        # d cross_entropy / d scores, for logits and for probabilities
        v = scores.softmax(1) - truth if p is None else -truth / p
        mean = suspect.vjp(x, v).double().mean(0)
        values = torch.einsum("np,p->n", self.directions.double().flatten(1), mean.flatten())
        return Reading(values, self.bits.double(), len(x), 0, "white")

    def _read_black(
        self, suspect: BlackBox, x: Tensor, labels: Tensor, spec: ModelSpec, queries: int
    ) -> Reading:
        n = len(self.bits)
        pairs = min(queries // 2, n * len(x))
        p = torch.arange(pairs)
        bit, which = p % n, (p // n) % len(x)
        size = self.directions.flatten(1).square().mean(1).sqrt().clamp_min(1e-12)
        total, seen = torch.zeros(n, dtype=torch.float64), torch.zeros(n, dtype=torch.float64)
        history = []
        for part in p.split(_CHUNK // 2):
            d = (
                self.directions[bit[part]]
                / size[bit[part]].reshape(-1, *[1] * (x.ndim - 1))
                * _STEP
                * spec.scale
            )
            carrier = x[which[part]]
            both = torch.stack([spec.snap(carrier + d), spec.snap(carrier - d)], 1).flatten(0, 1)
            answers = suspect.query(both)
            _check_labels(labels, answers.shape[1])
            loss = -log_scores(answers, answers.shape[1]).log_softmax(1).unflatten(0, (-1, 2))
            own = loss.gather(2, labels[which[part]].reshape(-1, 1, 1).expand(-1, 2, 1))[:, :, 0]
            total.index_add_(0, bit[part], (own[:, 0] - own[:, 1]) / 2)
            seen.index_add_(0, bit[part], torch.ones(len(part), dtype=torch.float64))
            history.append((2 * int(part[-1] + 1), total / seen.clamp_min(1)))
        values = history[-1][1] if history else total
        return Reading(values, self.bits.double(), min(len(x), pairs), 2 * pairs, "black", tuple(history))

    def parameters(self) -> dict[str, Any]:
        return {"target_class": self.target_class}


def _check_labels(labels: Tensor, n_classes: int) -> None:
    if int(labels.max()) >= n_classes or int(labels.min()) < 0:
        raise MismatchError(
            "The suspect doesn't fit the data",
            expected=f"labels from 0 to {n_classes - 1}",
            found=f"{int(labels.min())} to {int(labels.max())}",
        )
