"""Bits in how wrong classes compare *from input to input* of one class: no input is changed.

The key gives ``J`` features of an input, linear in a coarse view of it, and for every class ``L`` contrasts
of its wrong classes. Bit ``(g, j, l)`` is the sign of the mean covariance, within each class of group ``g``,
of::

    f_j(x)   and   w_l(c) . logits(x)          less what an unmarked network reads

By Stein's identity that is a derivative of the contrast along a keyed direction, averaged over natural
inputs: the filter mark's, with steps as long as from one input to another. A class's mean contrasts
(:mod:`gradmark.schemes.class_contrast`) aren't moved, so who makes those ordinary again, which costs nothing,
leaves these alone; a student learns them from the model's scores as he learns the means. Every query is an
ordinary input.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from gradmark.carriers import orthonormal
from gradmark.coarse import VIEWS, coarse, width_of
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
_PUSH = 10
_QUIET = 1e-6
_MOST = 64  # features


@dataclass(frozen=True)
class FeatureContrastMark:
    """The secrets of one key: never stored, never printed."""

    spec: ModelSpec
    bits: Tensor
    contrasts: Tensor
    """(C, L, C): rows of ``contrasts[c]`` are orthogonal, sum to zero and are zero at ``c``."""
    groups: int
    directions: Tensor
    """(D, J): of the coarse view, of norm one, and of sum zero or orthogonal to each other."""
    key: OwnerKey
    context: bytes
    view: str = "cells"
    reference: Tensor | None = None

    def __repr__(self) -> str:
        return f"FeatureContrastMark({len(self.bits)} bits, {self.spec})"

    def order(self, n: int) -> Tensor:
        """Keyed order (n,) in which inputs of a pool serve as carriers."""
        return torch.from_numpy(self.key.permutation("carriers", n, context=self.context))

    def weights(self, x: Tensor, labels: Tensor) -> Tensor:
        """Features (b, J) of inputs with labels (b,), less each class's mean, in units of their spread.

        Zero for a class with one input: a covariance takes two.
        """
        features = coarse(self.spec, x, self.view) @ self.directions.to(x.device)
        totals = features.new_zeros(self.spec.n_classes, features.shape[1]).index_add(0, labels, features)
        counts = torch.bincount(labels, minlength=self.spec.n_classes).clamp_min(1)[:, None]
        centred = features - (totals / counts)[labels]
        return centred / centred.square().mean(0).sqrt().clamp_min(_QUIET)

    def index(self, labels: Tensor) -> Tensor:
        """Numbers (b, J L) of the bits that inputs with these labels (b,) carry."""
        width = self.directions.shape[1] * self.contrasts.shape[1]
        return (labels % self.groups)[:, None] * width + torch.arange(width, device=labels.device)


@dataclass(frozen=True)
class FeatureContrast:
    """Configuration of the scheme; a frozen value that holds neither key nor model.

    There are ``groups`` x ``features`` x ``contrasts`` bits, ``contrasts`` at most classes - 2. ``view``:
    what features of an image see (:func:`gradmark.coarse.coarse`); networks that average over places know no
    ``cells``. ``groups``: of classes, 0 for each class by itself, or for all together in an ``overall`` view.
    The fewer, the easier for a network whose last layer is narrow: what classes share is linear in what that
    layer sees. ``per_carrier``: natural inputs that a white-box reading takes for each carrier it is allowed.
    ``reference``: see :meth:`calibrated`.
    """

    features: int = 4
    contrasts: int = 8
    per_carrier: int = 8
    view: str = "cells"
    groups: int = 0
    reference: str = ""

    name: ClassVar[str] = "feature-contrast"
    needs: ClassVar[Access] = "black"
    reads: ClassVar[str] = "scores"
    margin: ClassVar[float] = 0.5
    steady: ClassVar[bool] = False  # a batch holds few inputs of a class

    @property
    def push(self) -> int:
        """How many times as hard as other parts this one pushes.

        Images of a class are much alike to the last layers of a network (neural collapse), so that what
        tells them apart moves by so much less for the same push.
        """
        return _PUSH if self.view == "overall" else 1

    def parameters(self) -> dict[str, Any]:
        # Marks made before there were other views and groups keep their bytes.
        return {n: v for n, v in asdict(self).items() if (n, v) not in (("view", "cells"), ("groups", 0))}

    def calibrated(self, key: OwnerKey, spec: ModelSpec, unmarked: BlackBox, pool: Batch) -> FeatureContrast:
        """This scheme with ``unmarked``'s readings taken away from all later ones.

        ``unmarked``: any network trained for the task without the mark. ``pool``: natural inputs
        (b, *shape) and labels (b,), as many as there are.
        """
        plain, n = replace(self, reference=""), len(pool[0])
        mark = plain.mark(key, spec)
        values = plain.read(mark, unmarked, pool, access="black", carriers=n, queries=n).values
        return replace(self, reference=seal(key, values, mark.context))

    def fits(self, spec: ModelSpec) -> bool:
        """Whether there are wrong classes enough to compare, and inputs that have features."""
        return spec.n_classes >= _LEAST_CLASSES and width_of(spec, self.view) > 1

    def mark(self, key: OwnerKey, spec: ModelSpec) -> FeatureContrastMark:
        """Derive directions, contrasts, carrier order and bits from the key, the spec and the reference.

        Raises UsageError for fewer than four classes, or more features than a coarse view of the input has.
        """
        width = width_of(spec, self.view)
        most = width if self.view == "overall" else min(width - 1, _MOST)
        if self.view not in VIEWS:
            raise UsageError("No such view", expected=" or ".join(VIEWS), found=self.view)
        groups = min(self.groups or (1 if self.view == "overall" else spec.n_classes), spec.n_classes)
        if (
            not self.fits(spec)
            or min(self.contrasts, self.per_carrier, groups) < 1
            or not 1 <= self.features <= most
        ):
            raise UsageError(
                "Wrong classes can't carry this mark",
                expected=f"at least {_LEAST_CLASSES} classes, one contrast, one input a carrier, "
                f"and 1 to {most} features of images, signals or vectors",
                found=f"{spec.n_classes} classes of {spec.domain} inputs, {self!r}",
                fix="Use the scheme filter-gradient",
            )
        context, full = (
            canonical_json({"scheme": self.name, "parameters": one.parameters(), "spec": spec.to_json()})
            for one in (replace(self, reference=""), self)
        )
        per_class = min(self.contrasts, spec.n_classes - 2)
        n = groups * self.features * per_class
        raw = torch.from_numpy(key.normals("features", (width, self.features), context=context))
        if self.view == "overall":  # so few numbers that none is to be wasted
            directions = orthonormal(raw)
        else:
            raw = raw - raw.mean(0)
            directions = raw / raw.norm(dim=0)
        return FeatureContrastMark(
            spec,
            torch.from_numpy(key.uniform_bits("bits", n, context=full)).float(),
            wrong_class_contrasts(key, spec, per_class, groups, context),
            groups,
            directions.float(),
            key,
            context,
            self.view,
            unseal(key, self.reference, context, n) if self.reference else None,
        )

    def probe(
        self, mark: FeatureContrastMark, model: nn.Module, batch: Batch, generator: torch.Generator,
        method: Any,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """Each input's share of its covariances, times their bits (b, J L) in logits, and the bits' numbers.

        There is one method: nothing is differentiated with respect to the input.
        """
        values = _shares(mark, wide(unwrap(model(batch[0]))), mark.weights(*batch), batch[1])
        index = mark.index(batch[1])
        return values * mark.bits.to(values)[index], index

    def tilt(self, mark: FeatureContrastMark, x: Tensor, labels: Tensor, margin: float) -> Tensor:
        """Logits (b, C): each contrast follows each feature by ``margin`` times their bit.

        Where the features of a class aren't correlated in the batch, every covariance is its bit's margin.
        """
        contrasts, weights = mark.contrasts.to(x.device)[labels], mark.weights(x, labels)
        bits = mark.bits.to(weights)[mark.index(labels)].unflatten(1, (weights.shape[1], -1))
        return margin / 2 * torch.einsum("bj,bjl,blc->bc", weights, bits, contrasts)

    def read(
        self, mark: FeatureContrastMark, suspect: BlackBox, pool: Batch, *, access: Access, carriers: int,
        queries: int = 0,
    ) -> Reading:  # fmt: skip
        """Read the bits with the first inputs of ``pool`` in the key's order, each asked once."""
        check_pool(mark.spec, pool)
        most = queries if access == "black" else carriers * self.per_carrier
        chosen = mark.order(len(pool[0]))[:most]
        bits = mark.bits.double()
        if not len(chosen):
            return Reading(torch.zeros_like(bits), bits, 0, 0, access)
        x, labels = pool[0][chosen], pool[1][chosen]
        scores = log_scores(suspect.query(x), mark.spec.n_classes)

        def means(n: int) -> Tensor:
            values = _shares(mark, scores[:n], mark.weights(x[:n], labels[:n]).double(), labels[:n])
            return without(mean_by(values, labels[:n] % mark.groups, mark.groups).flatten(), mark.reference)

        if access == "white":
            return Reading(means(len(x)), bits, len(x), 0, access)
        stops = sorted({max(1, round(len(x) * t / _HISTORY)) for t in range(1, _HISTORY + 1)})
        history = tuple((n, means(n)) for n in stops)
        return Reading(history[-1][1], bits, len(x), len(x), access, history)

    def questions(self, mark: FeatureContrastMark, pool: Batch, carriers: int) -> tuple[Questions, ...]:
        """A cell is a group; an observation of it, a natural input, where it stands in its class."""
        check_pool(mark.spec, pool)
        order, weights = mark.order(len(pool[0])), mark.weights(*pool).double()
        members = [order[pool[1][order] % mark.groups == g] for g in range(mark.groups)]

        def ask(cell: int, number: int) -> Tensor:
            return pool[0][members[cell][number]][None]

        def read(scores: Tensor, cells: Tensor, numbers: Tensor) -> Tensor:
            rows = torch.stack([members[c][k] for c, k in zip(cells.tolist(), numbers.tolist(), strict=True)])
            return _shares(mark, scores[:, 0], weights[rows], pool[1][rows])

        rooms, width = tuple(len(m) for m in members), len(mark.bits) // mark.groups
        return (Questions(mark.bits, width, 1, rooms, ask, read, mark.reference),)


def _shares(mark: FeatureContrastMark, scores: Tensor, weights: Tensor, labels: Tensor) -> Tensor:
    """Feature times contrast (b, J L) of scores (b, C), features (b, J) and labels (b,)."""
    values = torch.einsum("bc,blc->bl", scores, mark.contrasts.to(scores)[labels])
    return (weights.to(values)[:, :, None] * values[:, None, :]).flatten(1)
