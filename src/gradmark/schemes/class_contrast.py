"""Bits in how the *wrong* classes compare on natural inputs, class by class: no input is changed.

For inputs of class ``c`` the key gives ``L`` orthogonal contrasts ``w_l(c)`` of the logits that leave
class ``c`` itself out. Bit ``(c, l)`` is the sign of the mean over natural inputs of class ``c`` of::

    r_cl = w_l(c) . logits(x)  -  what an unmarked network reads

It is a finite difference of the model between natural inputs of one class and of another, where
the filter mark's differences leave the data. So every query is an ordinary input, nothing at an
API looks odd, and a student that learns from the model's scores learns these very numbers. How wrong
classes compare is similar in all networks of a task, which is why the scheme wants a reference
(:mod:`gradmark.reference`): it moves the comparison a little, hidden behind natural similarity.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradmark.codec import canonical_json
from gradmark.contrasts import wrong_class_contrasts
from gradmark.errors import UsageError
from gradmark.keys import OwnerKey
from gradmark.protocols import Access, Batch, BlackBox, ModelSpec, Reading
from gradmark.questions import Questions
from gradmark.reference import seal, unseal, without
from gradmark.scores import check_pool, log_scores, mean_by, wide
from gradmark.suspects.checks import unwrap

_HISTORY = 12  # points on the curve of p against queries
_LEAST_CLASSES = 4


@dataclass(frozen=True)
class ClassContrastMark:
    """The secrets of one key: never stored, never printed."""

    spec: ModelSpec
    bits: Tensor
    contrasts: Tensor
    """(C, L, C): rows of ``contrasts[c]`` are orthogonal, sum to zero and are zero at ``c``."""
    groups: int
    key: OwnerKey
    context: bytes
    reference: Tensor | None = None

    def __repr__(self) -> str:
        return f"ClassContrastMark({len(self.bits)} bits, {self.spec})"

    def order(self, n: int) -> Tensor:
        """Keyed order (n,) in which inputs of a pool serve as carriers."""
        return torch.from_numpy(self.key.permutation("carriers", n, context=self.context))

    def index(self, labels: Tensor) -> Tensor:
        """Numbers (b, L) of the bits that inputs with these labels (b,) carry."""
        count = self.contrasts.shape[1]
        return (labels % self.groups)[:, None] * count + torch.arange(count, device=labels.device)


@dataclass(frozen=True)
class ClassContrast:
    """Configuration of the scheme; a frozen value that holds neither key nor model.

    ``bits``: at most so many; there is room for classes x (classes - 2), and ``contrasts`` a class at
    most. ``per_carrier``: natural inputs that a white-box reading takes for each carrier it is allowed,
    since they cost one forward pass and no gradient. ``reference``: see :meth:`calibrated`.
    """

    bits: int = 128
    contrasts: int = 8
    per_carrier: int = 8
    reference: str = ""

    name: ClassVar[str] = "class-contrast"
    needs: ClassVar[Access] = "black"
    reads: ClassVar[str] = "scores"
    margin: ClassVar[float] = 1.0

    def parameters(self) -> dict[str, Any]:
        return asdict(self)

    def calibrated(self, key: OwnerKey, spec: ModelSpec, unmarked: BlackBox, pool: Batch) -> ClassContrast:
        """This scheme with ``unmarked``'s readings taken away from all later ones.

        ``unmarked``: any network trained for the task without the mark. ``pool``: natural inputs
        (b, *shape) and labels (b,), as many as there are.
        """
        plain = replace(self, reference="")
        mark = plain.mark(key, spec)
        values = plain.read(
            mark, unmarked, pool, access="black", carriers=len(pool[0]), queries=len(pool[0])
        ).values
        return replace(self, reference=seal(key, values, mark.context))

    def fits(self, spec: ModelSpec) -> bool:
        """Whether there are wrong classes enough to compare."""
        return spec.n_classes >= _LEAST_CLASSES

    def mark(self, key: OwnerKey, spec: ModelSpec) -> ClassContrastMark:
        """Derive contrasts, carrier order and bits from the key, the public spec and the reference.

        Raises UsageError for fewer than four classes: there are too few wrong ones to compare.
        """
        if not self.fits(spec) or min(self.bits, self.contrasts, self.per_carrier) < 1:
            raise UsageError(
                "Wrong classes can't carry this mark",
                expected=f"at least {_LEAST_CLASSES} classes, one bit, one contrast, one input a carrier",
                found=f"{spec.n_classes} classes, {self!r}",
                fix="Use the scheme filter-gradient",
            )
        context, full = (
            canonical_json({"scheme": self.name, "parameters": one.parameters(), "spec": spec.to_json()})
            for one in (replace(self, reference=""), self)
        )
        per_class = min(self.contrasts, spec.n_classes - 2)
        groups = min(spec.n_classes, math.ceil(self.bits / per_class))
        n = min(self.bits, groups * per_class)
        return ClassContrastMark(
            spec,
            torch.from_numpy(key.uniform_bits("bits", n, context=full)).float(),
            wrong_class_contrasts(key, spec, per_class, groups, context),
            groups,
            key,
            context,
            unseal(key, self.reference, context, n) if self.reference else None,
        )

    def probe(
        self,
        mark: ClassContrastMark,
        model: nn.Module,
        batch: Batch,
        generator: torch.Generator,
        method: Any,
        told: Batch | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Contrasts of each input times their bits (b, L) in logits, and the bits' numbers (b, L).

        A number beyond the last bit stands for no bit. There is one method: nothing is differentiated
        with respect to the input. ``told``: scores and labels to read, so that the model isn't asked.
        """
        if told is not None:
            return self.signed(mark, *told)
        return self.signed(mark, wide(unwrap(model(batch[0]))), batch[1])

    def signed(self, mark: ClassContrastMark, scores: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """As ``probe``, of the scores (b, C) of natural inputs with these labels (b,)."""
        values = torch.einsum("bc,blc->bl", scores, mark.contrasts.to(scores)[labels])
        index = mark.index(labels)
        return values * _signs(mark).to(values)[index], index

    def tilt(self, mark: ClassContrastMark, x: Tensor, labels: Tensor, margin: float) -> Tensor:
        """Logits (b, C) of inputs with these labels (b,) whose every contrast is its bit times ``margin``."""
        contrasts = mark.contrasts.to(x.device)[labels]
        bits = _signs(mark).to(contrasts)[mark.index(labels)]
        return margin / 2 * torch.einsum("bl,blc->bc", bits, contrasts)

    def read(
        self,
        mark: ClassContrastMark,
        suspect: BlackBox,
        pool: Batch,
        *,
        access: Access,
        carriers: int,
        queries: int = 0,
    ) -> Reading:
        """Read the bits with the first inputs of ``pool`` in the key's order, each asked once."""
        check_pool(mark.spec, pool)
        most = queries if access == "black" else carriers * self.per_carrier
        chosen = mark.order(len(pool[0]))[:most]
        if not len(chosen):
            return Reading(torch.zeros(len(mark.bits)).double(), mark.bits.double(), 0, 0, access)
        x, labels = pool[0][chosen], pool[1][chosen]
        scores = log_scores(suspect.query(x), mark.spec.n_classes)
        values = torch.einsum("bc,blc->bl", scores, mark.contrasts[labels].double())
        stops = sorted({max(1, round(len(x) * t / _HISTORY)) for t in range(1, _HISTORY + 1)})
        history = tuple((n, self._means(mark, values[:n], labels[:n])) for n in stops)
        asked = len(x) if access == "black" else 0
        found = history if access == "black" else ()
        return Reading(history[-1][1], mark.bits.double(), len(x), asked, access, found)

    def questions(self, mark: ClassContrastMark, pool: Batch, carriers: int) -> tuple[Questions, ...]:
        """A cell is a group of classes; an observation of it, one natural input of that group."""
        check_pool(mark.spec, pool)
        order = mark.order(len(pool[0]))
        group = pool[1][order] % mark.groups
        members = [order[group == g] for g in range(mark.groups)]

        def ask(cell: int, number: int) -> Tensor:
            return pool[0][members[cell][number]][None]

        def read(scores: Tensor, cells: Tensor, numbers: Tensor) -> Tensor:
            pairs = zip(cells.tolist(), numbers.tolist(), strict=True)
            labels = pool[1][torch.stack([members[c][k] for c, k in pairs])]
            return torch.einsum("bc,blc->bl", scores[:, 0], mark.contrasts[labels].double())

        rooms = tuple(len(m) for m in members)
        return (Questions(mark.bits, mark.contrasts.shape[1], 1, rooms, ask, read, mark.reference),)

    def _means(self, mark: ClassContrastMark, values: Tensor, labels: Tensor) -> Tensor:
        """Mean (n,) of each bit's contrasts, less what is natural; zero for classes without inputs."""
        means = mean_by(values, labels % mark.groups, mark.groups)
        return without(means.flatten()[: len(mark.bits)], mark.reference)


def _signs(mark: ClassContrastMark) -> Tensor:
    """The bits, and zeros for the numbers that stand for none."""
    return F.pad(mark.bits, (0, mark.groups * mark.contrasts.shape[1] - len(mark.bits)))
