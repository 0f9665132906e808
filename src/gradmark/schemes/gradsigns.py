"""GradSigns (Aramoon, Chen, Qu: Don't Forget to Sign the Gradients!, MLSys 2021), as published.

The key draws a target class, ``N`` carrier pixels and a Gaussian projection ``W`` (n, N). With ``g``
the mean over inputs of the target class of the cross-entropy's gradient at the carrier pixels, bit
``j`` is the sign of ``<W_j, g>``. Black-box, the derivative at each carrier pixel is estimated by a
one-sided difference: ``N + 1`` queries an image, whatever the number of bits.

Positions are fixed, and the gradient is the cross-entropy's: it vanishes where the network is sure.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradmark.codec import canonical_json
from gradmark.embed.modes import scores_beside
from gradmark.errors import MismatchError, UsageError
from gradmark.keys import OwnerKey
from gradmark.protocols import Access, Batch, BlackBox, ModelSpec, Reading, WhiteBox
from gradmark.scores import check_classes, check_shape, log_scores, probabilities

Method = Literal["exact", "central-difference"]
_CHUNK = 1024  # queries put together before they are sent
_HISTORY = 12


@dataclass(frozen=True)
class GradSignsMark:
    """The secrets of one key: never stored, never printed."""

    spec: ModelSpec
    bits: Tensor
    target: int
    pixels: Tensor
    """(N,) places in the flattened input."""
    projection: Tensor
    """(n, N)"""
    key: OwnerKey
    context: bytes

    def __repr__(self) -> str:
        return f"GradSignsMark({len(self.bits)} bits, {self.spec})"

    def order(self, n: int) -> Tensor:
        """Keyed order (n,) in which inputs of a pool serve as carriers."""
        return torch.from_numpy(self.key.permutation("carriers", n, context=self.context))

    def scattered(self, rows: Tensor, x: Tensor) -> Tensor:
        """Rows (m, N) at the carrier pixels of inputs like ``x``: (m, *shape), zero elsewhere."""
        flat = rows.new_zeros(len(rows), int(np.prod(self.spec.input_shape)))
        return flat.index_copy(1, self.pixels.to(rows.device), rows).reshape(-1, *x.shape[1:])


@dataclass(frozen=True)
class GradSigns:
    """``bits``: how many. ``pixels``: carrier pixels, all of the input if it has fewer. ``step``: the nudge
    of one pixel, relative to the input's scale, and the unit of readings: they are the change of the
    cross-entropy, in nats, for a nudge of that size at every carrier pixel. ``bits_per_carrier``: bits
    that an input trains at a time by central difference; the exact method trains all of them.
    """

    bits: int = 64
    pixels: int = 384
    step: float = 8 / 255
    bits_per_carrier: int = 8

    name: ClassVar[str] = "gradsigns"
    needs: ClassVar[Access] = "black"
    reads: ClassVar[str] = "gradients"

    def parameters(self) -> dict[str, Any]:
        return asdict(self)

    def mark(self, key: OwnerKey, spec: ModelSpec) -> GradSignsMark:
        """Derive target class, pixels, projection and bits. Raises UsageError on impossible settings.

        The signs of Gaussian projections of N numbers can be set at will up to some 2 N of them.
        """
        size = int(np.prod(spec.input_shape))
        n = min(self.pixels, size)
        if min(self.bits, n, self.bits_per_carrier) < 1 or not 0 < self.step <= 1 or spec.n_classes < 2:
            raise UsageError(
                "A mark needs at least one bit and pixel, two classes, and 0 < step <= 1", found=repr(self)
            )
        if self.bits > 2 * n:
            raise UsageError(
                "The carrier pixels can't hold that many bits",
                expected=f"at most {2 * n} bits on {n} pixels",
                found=str(self.bits),
                fix="ask for fewer bits",
            )
        context = canonical_json(
            {"scheme": self.name, "parameters": self.parameters(), "spec": spec.to_json()}
        )
        projection = torch.from_numpy(key.normals("projection", (self.bits, n), context=context))
        return GradSignsMark(
            spec,
            torch.from_numpy(key.uniform_bits("bits", self.bits, context=context)).float(),
            int(key.integers("target", 1, spec.n_classes, context=context)[0]),
            torch.from_numpy(key.permutation("pixels", size, context=context))[:n],
            projection.float() * (self.step * spec.scale),
            key,
            context,
        )

    def carrying(self, mark: GradSignsMark, labels: Tensor) -> Tensor:
        """Inputs of the target class."""
        return labels == mark.target

    def probe(
        self, mark: GradSignsMark, model: nn.Module, batch: Batch, generator: torch.Generator, method: Method
    ) -> tuple[Tensor, Tensor]:
        """Readings times bits (m, A), in nats, of the batch's ``m`` inputs of the target class; m may be 0.

        ``exact`` reads all bits by double backward (A = n), ``central-difference`` some random ones by two
        forward passes each. The whole batch sets the batch norms' statistics.
        """
        natural = batch[0]
        x = natural[self.carrying(mark, batch[1])].detach()
        n = len(mark.bits)
        if method == "exact":
            index = torch.arange(n).expand(len(x), n)
            x = x.clone().requires_grad_()
            loss = _cross_entropy(scores_beside(model, natural, x), mark.target).sum()
            (gradient,) = torch.autograd.grad(loss, x, create_graph=True)
            rows = gradient.flatten(1)[:, mark.pixels.to(x.device)]
            values = rows @ mark.projection.to(rows).T
        else:
            each = min(self.bits_per_carrier, n)
            index = torch.rand(len(x), n, generator=generator).argsort(1)[:, :each]
            d = mark.scattered(mark.projection[index.flatten()].to(x), x)
            many = x.repeat_interleave(each, 0)
            scores = scores_beside(model, natural, torch.cat([many + d, many - d]))
            plus, minus = _cross_entropy(scores, mark.target).chunk(2)
            values = ((plus - minus) / 2).reshape(len(x), each)
        return values * mark.bits.to(values)[index.to(values.device)], index

    def read(
        self, mark: GradSignsMark, suspect: WhiteBox | BlackBox, pool: Batch, *, access: Access,
        carriers: int, queries: int = 0,
    ) -> Reading:  # fmt: skip
        """Read with the first ``carriers`` inputs of the target class in the key's order.

        Raises MismatchError where the data or the suspect don't fit, or no input is of that class.
        """
        check_shape(mark.spec, pool[0])
        order = mark.order(len(pool[0]))
        x = pool[0][order[pool[1][order] == mark.target][:carriers]]
        if not len(x):
            raise MismatchError("No input is of the mark's target class", expected=f"class {mark.target}")
        if access == "black":
            return self._read_black(mark, suspect, x, queries)
        if not isinstance(suspect, WhiteBox):
            raise MismatchError("White-box reading needs the model itself", found=suspect.name)
        scores = suspect.query(x)
        check_classes(scores, mark.spec.n_classes)
        truth = F.one_hot(torch.full((len(x),), mark.target), mark.spec.n_classes).float()
        p = probabilities(scores)
        v = scores.softmax(1) - truth if p is None else -truth / p  # d cross_entropy / d scores
        mean = suspect.vjp(x, v).double().flatten(1)[:, mark.pixels].mean(0)
        return Reading(mark.projection.double() @ mean, mark.bits.double(), len(x), 0, "white")

    def _read_black(self, mark: GradSignsMark, suspect: BlackBox, x: Tensor, queries: int) -> Reading:
        """Image by image: as it is, then with one carrier pixel nudged at a time, towards the far bound.

        The budget pays for as many images as it can and for some pixels of one more, in the key's order;
        each pixel's derivative is the mean over the images that were asked for it, and zero for none.
        """
        n = len(mark.pixels)
        images = min(len(x), -(-queries // (n + 1)))
        last = min(queries - (images - 1) * (n + 1), n + 1)  # queries left for the last one
        total, seen = torch.zeros(n, dtype=torch.float64), torch.zeros(n, dtype=torch.float64)
        history, spent, used, values = [], 0, 0, torch.zeros(len(mark.bits), dtype=torch.float64)
        for i in range(images):
            count = n + 1 if i + 1 < images else last
            if count < 2:
                break
            asked, size = self._nudged(mark, x[i], count - 1)
            scores = torch.cat([suspect.query(part) for part in asked.split(_CHUNK)])
            losses = _cross_entropy(log_scores(scores, mark.spec.n_classes), mark.target)
            total[: count - 1] += (losses[1:] - losses[0]) / size
            seen[: count - 1] += 1
            spent, used = spent + count, used + 1
            values = mark.projection.double() @ (total / seen.clamp_min(1))
            if i + 1 == images or i % max(1, images // _HISTORY) == 0:
                history.append((spent, values))
        if history and history[-1][0] != spent:
            history.append((spent, values))
        return Reading(values, mark.bits.double(), used, spent, "black", tuple(history))

    def _nudged(self, mark: GradSignsMark, x: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """One input and its copies with one of ``count`` pixels nudged (count + 1, *shape), and by how
        much (count,), which the input's format may have rounded."""
        asked = mark.spec.snap(x[None].repeat(count + 1, *[1] * x.ndim))
        flat, at = asked.flatten(1), mark.pixels[:count]
        step = self.step * mark.spec.scale
        high = torch.inf if mark.spec.high is None else mark.spec.high
        towards = torch.where(flat[0, at] + step > high, -step, step)
        rows = torch.arange(1, count + 1)
        before = flat[0, at].double()
        flat[rows, at] += towards
        asked = mark.spec.snap(flat.reshape(asked.shape))
        size = asked.flatten(1)[rows, at].double() - before
        return asked, torch.where(size == 0, torch.inf, size)  # a step too fine for the format reads zero


def _cross_entropy(scores: Tensor, target: int) -> Tensor:
    """(b,) nats, with one class for all."""
    return -scores.log_softmax(1)[:, target]
