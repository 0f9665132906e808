"""Bits in the gradient at secret inputs (in the manner of EaaW, NDSS 2025, with local keyed probes).

For keyed inputs ``x_s`` the key draws directions ``d_j`` and contrasts ``w_j`` of the logits, and bit
``j`` is the sign of ``<d_j, grad_x w_j . logits(x_s)>``, or of the difference of two answers at
``x_s + d_j`` and ``x_s - d_j``. Many bits, two queries each; but local, so training elsewhere forgets them.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from gradmark.codec import canonical_json
from gradmark.embed.modes import scores_beside
from gradmark.errors import MismatchError, UsageError
from gradmark.inputs import secret_inputs, smooth_noise
from gradmark.keys import OwnerKey
from gradmark.protocols import Access, Batch, BlackBox, ModelSpec, Reading, WhiteBox
from gradmark.questions import Questions
from gradmark.scores import check_classes, log_scores, probabilities

Method = Literal["exact", "central-difference"]
_HISTORY = 12


@dataclass(frozen=True)
class ProbeMark:
    """The secrets of one key: never stored, never printed."""

    spec: ModelSpec
    bits: Tensor
    inputs: Tensor
    """(n, *shape): the secret input of each bit."""
    directions: Tensor
    """(n, *shape)"""
    contrasts: Tensor
    """(n, C), each summing to zero, of norm sqrt(2)."""

    def __repr__(self) -> str:
        return f"ProbeMark({len(self.bits)} bits, {self.spec})"


@dataclass(frozen=True)
class ProbeGradient:
    """``bits``: how many. ``inputs``: secret inputs, among which the bits are dealt out in turn.
    ``step``: root-mean-square size of a direction, relative to the input's scale."""

    bits: int = 64
    inputs: int = 16
    step: float = 8 / 255

    name: ClassVar[str] = "probe-gradient"
    needs: ClassVar[Access] = "black"
    reads: ClassVar[str] = "gradients"

    def parameters(self) -> dict[str, Any]:
        return asdict(self)

    def mark(self, key: OwnerKey, spec: ModelSpec) -> ProbeMark:
        """Derive inputs, directions, contrasts and bits. Raises UsageError on impossible settings."""
        if min(self.bits, self.inputs) < 1 or not 0 < self.step <= 1 or spec.n_classes < 2:
            raise UsageError(
                "A mark needs at least one bit and input, two classes, and 0 < step <= 1", found=repr(self)
            )
        context = canonical_json(
            {"scheme": self.name, "parameters": self.parameters(), "spec": spec.to_json()}
        )
        secret = secret_inputs(key, spec, self.inputs, purpose="inputs", context=context)
        directions = smooth_noise(key, spec, self.bits, purpose="directions", context=context)
        raw = torch.from_numpy(key.normals("contrasts", (self.bits, spec.n_classes), context=context))
        raw = raw - raw.mean(1, keepdim=True)
        return ProbeMark(
            spec,
            torch.from_numpy(key.uniform_bits("bits", self.bits, context=context)).float(),
            secret[torch.arange(self.bits) % self.inputs],
            directions * (self.step * spec.scale),
            (raw * (2**0.5 / raw.norm(dim=1, keepdim=True))).float(),
        )

    def probe(
        self, mark: ProbeMark, model: nn.Module, batch: Batch, generator: torch.Generator, method: Method
    ) -> tuple[Tensor, Tensor]:
        """Readings times bits (m, 1) of as many random bits as the batch has inputs, in logits.

        The batch only sets the batch norms' statistics.
        """
        natural = batch[0]
        index = torch.randperm(len(mark.bits), generator=generator)[: len(natural)]
        x, d, w, bits = (
            t[index].to(natural) for t in (mark.inputs, mark.directions, mark.contrasts, mark.bits)
        )
        if method == "exact":
            x.requires_grad_()
            (gradient,) = torch.autograd.grad(
                (scores_beside(model, natural, x) * w).sum(), x, create_graph=True
            )
            values = (gradient * d).flatten(1).sum(1)
        else:
            plus, minus = scores_beside(model, natural, torch.cat([x + d, x - d])).chunk(2)
            values = ((plus - minus) * w).sum(1) / 2
        return (values * bits)[:, None], index[:, None]

    def read(
        self, mark: ProbeMark, suspect: WhiteBox | BlackBox, pool: Batch, *, access: Access, carriers: int,
        queries: int = 0,
    ) -> Reading:  # fmt: skip
        """Read the secret inputs; ``pool`` and ``carriers`` are not used. Bits beyond the budget are ties."""
        if access == "black":
            return self._read_black(mark, suspect, queries)
        if not isinstance(suspect, WhiteBox):
            raise MismatchError("White-box reading needs the model itself", found=suspect.name)
        scores = suspect.query(mark.inputs)
        check_classes(scores, mark.spec.n_classes)
        p = probabilities(scores)  # the chain rule through log: d(w.log p) = (w / p).dp
        gradient = suspect.vjp(mark.inputs, mark.contrasts if p is None else mark.contrasts / p)
        values = (gradient.double() * mark.directions).flatten(1).sum(1)
        return Reading(values, mark.bits.double(), self._used(self.bits), 0, "white")

    def _read_black(self, mark: ProbeMark, suspect: BlackBox, queries: int) -> Reading:
        pairs = min(queries // 2, self.bits)
        values = torch.zeros(self.bits, dtype=torch.float64)
        if not pairs:
            return Reading(values, mark.bits.double(), 0, 0, "black")
        x, d = mark.inputs[:pairs], mark.directions[:pairs]
        both = torch.stack([mark.spec.snap(x + d), mark.spec.snap(x - d)], 1).flatten(0, 1)
        scores = log_scores(suspect.query(both), mark.spec.n_classes).unflatten(0, (-1, 2))
        values[:pairs] = ((scores[:, 0] - scores[:, 1]) * mark.contrasts[:pairs]).sum(1) / 2
        stops = sorted({max(1, round(pairs * t / _HISTORY)) for t in range(1, _HISTORY + 1)})
        history = tuple((2 * stop, values * (torch.arange(self.bits) < stop)) for stop in stops)
        return Reading(values, mark.bits.double(), self._used(pairs), 2 * pairs, "black", history)

    def questions(self, mark: ProbeMark, pool: Batch, carriers: int) -> tuple[Questions, ...]:
        """One pair of queries a bit, at secret inputs; ``pool`` and ``carriers`` are not used."""

        def ask(cell: int, number: int) -> Tensor:
            x, d = mark.inputs[cell], mark.directions[cell]
            return mark.spec.snap(torch.stack([x + d, x - d]))

        def read(scores: Tensor, cells: Tensor, numbers: Tensor) -> Tensor:
            return ((scores[:, 0] - scores[:, 1]) * mark.contrasts[cells]).sum(1, keepdim=True) / 2

        return (Questions(mark.bits, 1, 2, (1,) * len(mark.bits), ask, read),)

    def _used(self, bits: int) -> int:
        return min(bits, self.inputs)
