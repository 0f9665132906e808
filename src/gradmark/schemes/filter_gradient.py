"""The flagship: bits in the gradient of keyed contrasts of *wrong* classes along keyed directions.

For an input ``x`` of class ``c`` the key gives ``K`` directions ``d_i(x)`` (:mod:`gradmark.carriers`)
and ``L`` orthogonal contrasts ``w_l(c)`` of the logits that never touch class ``c`` itself. Bit
``(i, l)`` is the sign of the mean over natural inputs of::

    r_il = < d_i(x), grad_x  w_l(c) . logits(x) >              white-box, by autograd
         = (w_l(c) . logits(x + d_i) - w_l(c) . logits(x - d_i)) / 2   black-box, two queries

How wrong classes compare is free room: labels don't fix it, so the mark costs little accuracy and
training on labels doesn't pull it back. One query pair reads all ``L`` contrasts at once. Since a
contrast sums to zero, log-probabilities serve as well as logits. The gradient depends only on the
function, so rewriting the weights without changing the function can't touch it.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradmark.carriers import Directions, keyed_directions, nudged
from gradmark.codec import canonical_json
from gradmark.contrasts import wrong_class_contrasts
from gradmark.errors import MismatchError, UsageError
from gradmark.keys import OwnerKey
from gradmark.protocols import Access, Batch, BlackBox, ModelSpec, Reading, WhiteBox
from gradmark.questions import Questions
from gradmark.reference import seal, unseal, without
from gradmark.scores import bounded, check_classes, check_pool, log_scores, mean_by, probabilities, wide
from gradmark.suspects.checks import unwrap
from gradmark.token_directions import WordDirections

Method = Literal["exact", "central-difference"]
_CHUNK = 64  # carriers at a time: bounds memory at K copies of each
_HISTORY = 12  # points on the curve of p against queries
_REFERENCE_CARRIERS, _REFERENCE_PAIRS = 500, 4000
_LATER = ("reference", "equaliser", "bound", "reading_step")
_MANY, _SWAPS = 16, 8  # directions, and pairs of tokens that a white-box reading puts into each carrier


@dataclass(frozen=True)
class FilterGradientMark:
    """The secrets of one key: never stored, never printed."""

    spec: ModelSpec
    bits: Tensor
    directions: Directions
    asked: Directions
    """``directions``, of the size an API is asked with."""
    contrasts: Tensor
    """(C, L, C): rows of ``contrasts[c]`` are orthogonal, sum to zero and are zero at ``c``."""
    key: OwnerKey
    context: bytes
    reference: Tensor | None = None
    """(n,) readings of an unmarked network, float64."""

    def __repr__(self) -> str:
        return f"FilterGradientMark({len(self.bits)} bits, {self.spec})"

    def order(self, n: int) -> Tensor:
        """Keyed order (n,) in which inputs of a pool serve as carriers."""
        return torch.from_numpy(self.key.permutation("carriers", n, context=self.context))

    def group(self, labels: Tensor) -> Tensor:
        """Group of directions (b,) of each label (b,)."""
        return labels % self.directions.groups

    def bit_index(self, i: Tensor, l: Tensor) -> Tensor:  # noqa: E741
        """Number of the bit on direction ``i`` and contrast ``l``."""
        return i * self.contrasts.shape[1] + l


@dataclass(frozen=True)
class FilterGradient:
    """Configuration of the scheme; a frozen value that holds neither key nor model.

    ``bits``: how many. ``contrasts``: at most so many per class (classes - 2 if fewer).
    ``class_groups``: 1 shares directions and contrasts among all classes, which a network learns about
    four times as fast; more groups of classes have their own, over which natural readings cancel.
    ``contrasts_per_carrier``: gradients taken per carrier when reading white-box. ``kernel_size``,
    ``whitening``, ``step``, ``equaliser``: see :mod:`gradmark.carriers`. ``reference``: sealed readings
    of an unmarked network, from :meth:`calibrated`. ``bound``: through an API, each pair of queries counts
    for at most so many times what the middle one does (0: no bound), for answers that jump at times; a
    step-by-step reading, which doesn't know the middle yet, goes without. ``reading_step``: an API's nudges,
    where they are to be smaller than those of training (0: ``step``); coarse levels round tiny ones away.
    """

    bits: int = 64
    contrasts: int = 8
    class_groups: int = 1
    contrasts_per_carrier: int = 2
    kernel_size: int = 5
    whitening: float = 1.0
    step: float = 8 / 255
    reference: str = ""
    equaliser: bool = False
    bound: float = 0.0
    reading_step: float = 0.0

    name: ClassVar[str] = "filter-gradient"
    margin: ClassVar[float] = 0.3
    needs: ClassVar[Access] = "black"
    reads: ClassVar[str] = "gradients"

    def parameters(self) -> dict[str, Any]:
        # Marks made before there were these keep their bytes.
        return {n: v for n, v in asdict(self).items() if v or n not in _LATER}

    def calibrated(self, key: OwnerKey, spec: ModelSpec, unmarked: BlackBox, pool: Batch) -> FilterGradient:
        """This scheme with ``unmarked``'s readings taken away from all later ones.

        ``unmarked``: any network trained for the task without the mark, the control or the one that
        embedding starts from. ``pool``: natural inputs (b, *shape) and labels; 500 suffice.
        """
        plain = replace(self, reference="")
        mark = plain.mark(key, spec)
        k = mark.directions.n
        # Gradients tell all directions at once; finite differences are dear where these are many.
        words = isinstance(mark.directions, WordDirections)
        white = isinstance(unmarked, WhiteBox) and not words and (k > _MANY or spec.domain == "text")
        n = min(len(pool[0]), _REFERENCE_CARRIERS)
        n = n if white else min(n, max(1, _REFERENCE_PAIRS // k))
        way: Access = "white" if white else "black"
        values = plain.read(mark, unmarked, pool, access=way, carriers=n, queries=2 * n * k).values
        return replace(self, reference=seal(key, values, mark.context))

    def mark(self, key: OwnerKey, spec: ModelSpec) -> FilterGradientMark:
        """Derive bits, directions, contrasts and carrier order from the key and the public spec.

        Raises UsageError where the input offers fewer directions than the bits need.
        """
        small = min(self.bits, self.contrasts, self.class_groups, self.kernel_size) < 1
        if small or not 0 <= self.reading_step <= 1 >= self.step > 0 or not 0 <= self.bound < math.inf:
            least = "one bit, contrast, class group and tap, 0 < step <= 1, reading_step <= 1, and 0 <= bound"
            raise UsageError("A mark can't be that small", expected=f"at least {least}", found=repr(self))
        if spec.n_classes < 2:
            raise UsageError("The model needs at least two classes", found=str(spec.n_classes))
        context, full = (
            canonical_json({"scheme": self.name, "parameters": one.parameters(), "spec": spec.to_json()})
            for one in (replace(self, reference=""), self)
        )
        per_class = min(self.contrasts, max(1, spec.n_classes - 2))
        along = partial(
            keyed_directions, key, spec, n=math.ceil(self.bits / per_class), groups=self._groups(spec),
            context=context, kernel_size=self.kernel_size, whitening=self.whitening, equaliser=self.equaliser,
        )  # fmt: skip
        directions = along(step=self.step)
        asked = along(step=self.reading_step) if self.reading_step else directions
        # Directions come first and bits last: what was measured along the former can't know the latter.
        bits = torch.from_numpy(key.uniform_bits("bits", self.bits, context=full)).float()
        reference = unseal(key, self.reference, context, self.bits) if self.reference else None
        w = wrong_class_contrasts(key, spec, per_class, self._groups(spec), context)
        return FilterGradientMark(spec, bits, directions, asked, w, key, context, reference)

    def _groups(self, spec: ModelSpec) -> int:
        return min(self.class_groups, spec.n_classes)

    def probe(
        self,
        mark: FilterGradientMark,
        model: nn.Module,
        batch: Batch,
        generator: torch.Generator,
        method: Method,
    ) -> tuple[Tensor, Tensor]:
        """Signed readings of one random direction per input, differentiable in the weights.

        Returns readings times bits (m, A) in logits, and the bits' numbers (m, A); a number beyond
        the last bit stands for no bit. ``exact`` reads one random contrast per input by double backward
        (A = 1; where there is but one, along all directions, A = K), ``central-difference`` all of
        them (A = L) with two forward passes and no second order. The model's mode is the caller's.
        """
        x, labels = batch
        count = mark.contrasts.shape[1]
        i = torch.randint(mark.directions.n, (len(x),), generator=generator).to(x.device)
        w = mark.contrasts.to(x.device)[labels]
        if method == "exact":
            l = torch.randint(count, (len(x), 1), generator=generator).to(x.device)  # noqa: E741
            x = x.detach().requires_grad_()
            chosen = w.gather(1, l[:, :, None].expand(-1, -1, w.shape[2]))[:, 0]
            score = (wide(unwrap(model(x))) * chosen).sum()
            (gradient,) = torch.autograd.grad(score, x, create_graph=True)
            d = mark.directions.one(x.detach(), mark.group(labels), i)[:, None]
            if count == 1:  # few readings an input: take along all directions of the one gradient
                i = torch.arange(mark.directions.n, device=x.device).expand(len(x), -1)
                d = mark.directions.all(x.detach(), mark.group(labels))
            values = (gradient[:, None] * d).flatten(2).sum(2)
        else:
            l = torch.arange(count, device=x.device).expand(len(x), count)  # noqa: E741
            both = nudged(mark.directions, x, mark.group(labels), i)
            plus, minus = wide(unwrap(model(torch.cat(both)))).chunk(2)
            values = torch.einsum("bc,blc->bl", (plus - minus) / 2, w.to(plus.dtype))
        # The last direction may carry fewer bits than contrasts: what is beyond reads as zero.
        index = mark.bit_index(i.reshape(len(x), -1), l)
        room = mark.directions.n * count - len(mark.bits)
        return values * F.pad(mark.bits, (0, room)).to(x.device)[index], index

    def read(
        self,
        mark: FilterGradientMark,
        suspect: WhiteBox | BlackBox,
        pool: Batch,
        *,
        access: Access,
        carriers: int,
        queries: int = 0,
    ) -> Reading:
        """Read the bits with the first ``carriers`` inputs of ``pool`` in the key's order."""
        check_pool(mark.spec, pool)
        chosen = mark.order(len(pool[0]))[:carriers]
        x, labels = pool[0][chosen], pool[1][chosen]
        if access == "white" and isinstance(mark.directions, WordDirections):
            # Tokens have no derivative: as many pairs as cost about what gradients would.
            found = self._read_black(mark, suspect, x, labels, 2 * _SWAPS * len(x))
            return replace(found, access="white", queries=0, history=())
        if access == "black":
            return self._read_black(mark, suspect, x, labels, queries)
        if not isinstance(suspect, WhiteBox):
            raise MismatchError("White-box reading needs the model itself", found=suspect.name)
        return self._read_white(mark, suspect, x, labels)

    def questions(self, mark: FilterGradientMark, pool: Batch, carriers: int) -> tuple[Questions, ...]:
        """A cell is a direction; an observation of it, a pair of queries at a carrier of its own."""
        check_pool(mark.spec, pool)
        chosen = mark.order(len(pool[0]))[:carriers]
        x, labels = pool[0][chosen], pool[1][chosen]
        n, k = len(x), mark.directions.n

        def carrier(cells: Tensor, numbers: Tensor) -> Tensor:
            return (numbers + cells * (n // k)) % n

        def ask(cell: int, number: int) -> Tensor:
            i = torch.tensor([cell])
            j = carrier(i, torch.tensor([number]))
            both = nudged(mark.asked, x[j], mark.group(labels[j]), i)
            return mark.spec.snap(torch.cat(both))

        def read(scores: Tensor, cells: Tensor, numbers: Tensor) -> Tensor:
            contrasts = mark.contrasts[labels[carrier(cells, numbers)]].double()
            return torch.einsum("bc,blc->bl", (scores[:, 0] - scores[:, 1]) / 2, contrasts)

        width = mark.contrasts.shape[1]
        return (Questions(mark.bits, width, 2, (n,) * k, ask, read, mark.reference),)

    def _read_white(self, mark: FilterGradientMark, suspect: WhiteBox, x: Tensor, labels: Tensor) -> Reading:
        k, count = mark.directions.n, mark.contrasts.shape[1]
        total, seen = torch.zeros(k, count, dtype=torch.float64), torch.zeros(count, dtype=torch.float64)
        per = min(self.contrasts_per_carrier, count)
        position = torch.arange(len(x))
        scores = suspect.query(x)
        check_classes(scores, mark.spec.n_classes)
        p = probabilities(scores)
        for a in range(per):
            l = (position * per + a) % count  # noqa: E741  each contrast gets its share of carriers
            v = mark.contrasts[labels, l]
            if p is not None:  # the chain rule through log: d(w.log p) = (w / p).dp
                v = v / p
            gradient = suspect.vjp(x, v)
            for s in range(0, len(x), _CHUNK):
                part = slice(s, s + _CHUNK)
                d = mark.directions.all(x[part], mark.group(labels[part]))
                values = torch.einsum("bkp,bp->kb", d.flatten(2), gradient[part].flatten(1))
                total.index_add_(1, l[part], values.double())
            seen.index_add_(0, l, torch.ones(len(x), dtype=torch.float64))
        values = without((total / seen.clamp_min(1)).flatten()[: len(mark.bits)], mark.reference)
        return Reading(values, mark.bits.double(), len(x), 0, "white")

    def _read_black(
        self, mark: FilterGradientMark, suspect: BlackBox, x: Tensor, labels: Tensor, queries: int
    ) -> Reading:
        """Pair ``p`` nudges carrier ``p mod carriers`` along a direction that changes every round."""
        k = mark.directions.n
        pairs = min(queries // 2, len(x) * k)
        if not pairs:
            return Reading(torch.zeros(len(mark.bits)).double(), mark.bits.double(), 0, 0, "black")
        p = torch.arange(pairs)
        which = p % len(x)
        i = (which + p // len(x)) % k  # so k rounds take every carrier along every direction once
        stops = sorted({min(pairs, max(k, round(pairs * t / _HISTORY))) for t in range(1, _HISTORY + 1)})
        asked, labels_of = [], []
        for part in p.split(2 * _CHUNK):
            j = which[part]
            both = nudged(mark.asked, x[j], mark.group(labels[j]), i[part])
            asked.append(suspect.query(torch.stack([mark.spec.snap(b) for b in both], 1).flatten(0, 1)))
            labels_of.append(labels[j])
        # All answers are judged together: whether an API rounds must not depend on the chunk.
        scores = log_scores(torch.cat(asked), mark.spec.n_classes).unflatten(0, (-1, 2))
        contrasts = mark.contrasts[torch.cat(labels_of)].double()
        values = torch.einsum("bc,blc->bl", (scores[:, 0] - scores[:, 1]) / 2, contrasts)
        if self.bound:
            values = bounded(values, self.bound)
        means = ((n, mean_by(values[:n], i[:n], k).flatten()[: len(mark.bits)]) for n in stops)
        history = tuple((2 * n, without(mean, mark.reference)) for n, mean in means)
        return Reading(history[-1][1], mark.bits.double(), min(pairs, len(x)), 2 * pairs, "black", history)
