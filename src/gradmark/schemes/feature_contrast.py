"""Bits in how wrong classes compare *from input to input* of one class: no input is changed.

The key gives ``J`` features of an input, linear in a coarse view of it, and for every class ``L`` contrasts
of its wrong classes. Bit ``(c, j, l)`` is the sign of the covariance over natural inputs of class ``c`` of::

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
_CELLS = 4  # along each axis of an image
_BANDS = 16  # of a signal's spectrum
_QUIET = 1e-6
_MOST = 64  # features


@dataclass(frozen=True)
class FeatureContrastMark:
    """The secrets of one key: never stored, never printed."""

    spec: ModelSpec
    bits: Tensor
    contrasts: Tensor
    """(C, L, C): rows of ``contrasts[c]`` are orthogonal, sum to zero and are zero at ``c``."""
    directions: Tensor
    """(D, J): of the coarse view, of norm one and sum zero."""
    key: OwnerKey
    context: bytes
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
        features = coarse(self.spec, x) @ self.directions.to(x.device)
        totals = features.new_zeros(self.spec.n_classes, features.shape[1]).index_add(0, labels, features)
        counts = torch.bincount(labels, minlength=self.spec.n_classes).clamp_min(1)[:, None]
        centred = features - (totals / counts)[labels]
        return centred / centred.square().mean(0).sqrt().clamp_min(_QUIET)

    def index(self, labels: Tensor) -> Tensor:
        """Numbers (b, J L) of the bits that inputs with these labels (b,) carry."""
        width = self.directions.shape[1] * self.contrasts.shape[1]
        return labels[:, None] * width + torch.arange(width, device=labels.device)


@dataclass(frozen=True)
class FeatureContrast:
    """Configuration of the scheme; a frozen value that holds neither key nor model.

    There are classes x ``features`` x ``contrasts`` bits, ``contrasts`` at most classes - 2. ``per_carrier``:
    natural inputs that a white-box reading takes for each carrier it is allowed. ``reference``: see
    :meth:`calibrated`.
    """

    features: int = 4
    contrasts: int = 8
    per_carrier: int = 8
    reference: str = ""

    name: ClassVar[str] = "feature-contrast"
    needs: ClassVar[Access] = "black"
    reads: ClassVar[str] = "scores"
    margin: ClassVar[float] = 0.5
    steady: ClassVar[bool] = False  # a batch holds few inputs of a class

    def parameters(self) -> dict[str, Any]:
        return asdict(self)

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
        return spec.n_classes >= _LEAST_CLASSES and width_of(spec) > 1

    def mark(self, key: OwnerKey, spec: ModelSpec) -> FeatureContrastMark:
        """Derive directions, contrasts, carrier order and bits from the key, the spec and the reference.

        Raises UsageError for fewer than four classes, or more features than a coarse view of the input has.
        """
        width = width_of(spec)
        most = min(width - 1, _MOST)
        if not self.fits(spec) or min(self.contrasts, self.per_carrier) < 1 or not 1 <= self.features <= most:
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
        n = spec.n_classes * self.features * per_class
        raw = torch.from_numpy(key.normals("features", (width, self.features), context=context))
        raw = raw - raw.mean(0)
        return FeatureContrastMark(
            spec,
            torch.from_numpy(key.uniform_bits("bits", n, context=full)).float(),
            wrong_class_contrasts(key, spec, per_class, spec.n_classes, context),
            (raw / raw.norm(dim=0)).float(),
            key,
            context,
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
            return without(mean_by(values, labels[:n], mark.spec.n_classes).flatten(), mark.reference)

        if access == "white":
            return Reading(means(len(x)), bits, len(x), 0, access)
        stops = sorted({max(1, round(len(x) * t / _HISTORY)) for t in range(1, _HISTORY + 1)})
        history = tuple((n, means(n)) for n in stops)
        return Reading(history[-1][1], bits, len(x), len(x), access, history)

    def questions(self, mark: FeatureContrastMark, pool: Batch, carriers: int) -> tuple[Questions, ...]:
        """A cell is a class; an observation of it, a natural input, where it stands in its class."""
        check_pool(mark.spec, pool)
        order, weights = mark.order(len(pool[0])), mark.weights(*pool).double()
        members = [order[pool[1][order] == c] for c in range(mark.spec.n_classes)]

        def ask(cell: int, number: int) -> Tensor:
            return pool[0][members[cell][number]][None]

        def read(scores: Tensor, cells: Tensor, numbers: Tensor) -> Tensor:
            rows = torch.stack([members[c][k] for c, k in zip(cells.tolist(), numbers.tolist(), strict=True)])
            return _shares(mark, scores[:, 0], weights[rows], pool[1][rows])

        rooms, width = tuple(len(m) for m in members), len(mark.bits) // mark.spec.n_classes
        return (Questions(mark.bits, width, 1, rooms, ask, read, mark.reference),)


def _shares(mark: FeatureContrastMark, scores: Tensor, weights: Tensor, labels: Tensor) -> Tensor:
    """Feature times contrast (b, J L) of scores (b, C), features (b, J) and labels (b,)."""
    values = torch.einsum("bc,blc->bl", scores, mark.contrasts.to(scores)[labels])
    return (weights.to(values)[:, :, None] * values[:, None, :]).flatten(1)


def width_of(spec: ModelSpec) -> int:
    """How many numbers a coarse view of an input has; none of words."""
    channels = spec.input_shape[0] if len(spec.input_shape) > 1 else 1
    if spec.domain == "image":
        return channels * _CELLS**2
    if spec.domain == "signal":
        return channels * _BANDS
    return spec.input_shape[0] if spec.domain == "vector" else 0


def coarse(spec: ModelSpec, x: Tensor) -> Tensor:
    """What an input (b, *shape) looks like from afar (b, D), float32, and differentiable nowhere.

    Of an image the means of 4 x 4 cells of each channel, of a signal its amplitude in sixteen equal bands, in
    parts of the whole; a vector as it is.
    """
    x = x.detach().float()
    if spec.domain == "image":
        return F.adaptive_avg_pool2d(x.reshape(len(x), -1, *x.shape[-2:]), _CELLS).flatten(1)
    if spec.domain == "signal":
        energy = torch.fft.rfft(x.reshape(len(x), -1, x.shape[-1])).abs().square()
        bands = F.adaptive_avg_pool1d(energy, _BANDS)
        return (bands / bands.sum(2, keepdim=True).clamp_min(_QUIET)).sqrt().flatten(1)
    return x.flatten(1)
