"""Any function from a batch to class scores as a suspect."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gradmark.errors import GradmarkError, ModelError
from gradmark.suspects.checks import brief, check_inputs, check_scores


class CallableSuspect:
    """Black-box access to ``fn``, which maps a float32 tensor (b, *shape) on the CPU to (b, C).

    ``fn`` may answer with a tensor, a numpy array or nested lists. The digest covers the name only,
    for a function has no bytes to hash.
    """

    def __init__(self, fn: Callable[[Tensor], Any], *, name: str, batch_size: int = 256) -> None:
        self.fn = fn
        self.name = name
        self.digest = "sha256:" + hashlib.sha256(f"callable:{name}".encode()).hexdigest()
        self.batch_size = batch_size
        self._n_classes: int | None = None

    def __repr__(self) -> str:
        return f"CallableSuspect({self.name!r})"

    def query(self, x: Tensor) -> Tensor:
        """Scores (b, C), float32 on the CPU. Raises ModelError where ``fn`` fails or answers nonsense."""
        x = check_inputs(x, self.name).to(device="cpu", dtype=torch.float32)
        return torch.cat([self._ask(part) for part in torch.split(x, self.batch_size)])

    def _ask(self, x: Tensor) -> Tensor:
        try:
            with torch.no_grad():
                out = self.fn(x.clone())  # a copy: fn may write into what it gets
        except GradmarkError:
            raise
        except Exception as cause:  # a stranger's function may raise anything
            what = f"{self.name} fails on inputs of shape {tuple(x.shape)}"
            raise ModelError(what, found=brief(cause), fix="Check that the data fits the model") from cause
        scores = check_scores(out, x.shape[0], self._n_classes, self.name)
        self._n_classes = scores.shape[1]
        return scores
