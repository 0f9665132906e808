"""Bits in keyed projections of a layer's weights (Uchida et al., ICMR 2017).

The weights of each chosen layer are averaged over its filters, laid side by side and projected on
Gaussian directions: a bit is the sign of its projection. This reads parameters and not the function,
so whoever scales and permutes hidden units can rewrite it.

A mark of this kind betrays itself by spreading the weights (Wang and Kerschbaum, ICASSP 2019). Training
therefore also holds each marked layer to the quantiles of an unmarked network's (in the manner of RIGA,
WWW 2021, with a Wasserstein distance in place of an adversary).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from fnmatch import fnmatchcase
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from gradmark.codec import canonical_json
from gradmark.errors import MismatchError, ModelError, UsageError
from gradmark.keys import OwnerKey
from gradmark.protocols import Access, Batch, BlackBox, ModelSpec, Reading, WeightBox

_QUANTILES = 65
_LEAST = 0.01  # of the variance that independent weights' mean would have


@dataclass(frozen=True)
class WeightsMark:
    """The secrets of one key: never stored, never printed."""

    spec: ModelSpec
    bits: Tensor
    key: OwnerKey
    context: bytes

    def __repr__(self) -> str:
        return f"WeightsMark({len(self.bits)} bits, {self.spec})"

    def projection(self, length: int) -> Tensor:
        """(n, length) Gaussian directions, float64. Vectors of another length have others."""
        shape = (len(self.bits), length)
        return torch.from_numpy(self.key.normals(f"projection/{length}", shape, context=self.context))


@dataclass(frozen=True)
class Weights:
    """``bits``: how many. ``layers``: patterns of parameter names, as of the shell; by default one layer:
    of the parameters with two axes or more whose filters have at least ``bits`` entries, the middle one in
    the model's order (the lower of two), or the one with the largest filters where none has so many.
    ``length``: entries of the averaged weights that a suspect must have; 0 takes what is there, and a
    reshaped layer then reads as chance. ``preserve``: weight of the penalty that holds the layers to
    ``quantiles``, which :meth:`calibrated` measures. These two matter to training alone.
    """

    bits: int = 64
    layers: tuple[str, ...] = ()
    length: int = 0
    preserve: float = 1.0
    quantiles: tuple[tuple[float, ...], ...] = ()

    name: ClassVar[str] = "weights"
    needs: ClassVar[Access] = "white"
    reads: ClassVar[str] = "weights"

    def __post_init__(self) -> None:
        given: Any = self.layers  # a list in a mark file, a text on the command line
        object.__setattr__(self, "layers", (given,) if isinstance(given, str) else tuple(given))
        object.__setattr__(self, "quantiles", tuple(tuple(map(float, row)) for row in self.quantiles))

    def parameters(self) -> dict[str, Any]:
        rows = [list(row) for row in self.quantiles]
        return asdict(self) | {"layers": list(self.layers), "quantiles": rows}

    def calibrated(self, key: OwnerKey, spec: ModelSpec, unmarked: BlackBox, pool: Batch) -> Weights:
        """This scheme with the quantiles of ``unmarked``'s layers, rounded; unchanged where it shows none."""
        if not isinstance(unmarked, WeightBox) or not self.preserve:
            return self
        chosen = self._chosen(unmarked.weights(), unmarked.name)
        rows = (_quantiles(values.double()) for w in chosen.values() for values in _seen(w))
        return replace(self, quantiles=tuple(tuple(round(float(q), 6) for q in row) for row in rows))

    def mark(self, key: OwnerKey, spec: ModelSpec) -> WeightsMark:
        """Derive the bits; the projections follow when the layer's size is known. Raises UsageError."""
        if self.bits < 1 or self.length < 0 or not self.preserve >= 0:
            raise UsageError(
                "A mark needs at least one bit, length >= 0 and preserve >= 0",
                found=f"bits={self.bits}, length={self.length}, preserve={self.preserve}",
            )
        # What reading uses, and no more: marks made before there was a penalty keep their secrets.
        read = {"bits": self.bits, "layers": list(self.layers), "length": self.length}
        context = canonical_json({"scheme": self.name, "parameters": read, "spec": spec.to_json()})
        bits = torch.from_numpy(key.uniform_bits("bits", self.bits, context=context)).float()
        return WeightsMark(spec, bits, key, context)

    def probe(
        self, mark: WeightsMark, model: nn.Module, batch: Batch, generator: torch.Generator, method: str
    ) -> tuple[Tensor, Tensor]:
        """Every projection times its bit (1, n). Nothing is asked of the model, so both methods are one."""
        mean = self._mean(dict(model.named_parameters()), "the model")
        mean = mean if mean.dtype == torch.float64 else mean.float()
        signed = (mark.projection(len(mean)).to(mean) @ mean) * mark.bits.to(mean)
        return signed[None], torch.arange(len(mark.bits))[None]

    def distortion(self, mark: WeightsMark, model: nn.Module) -> Tensor:
        """Squared Wasserstein distance of the layers' weights from the quantiles, in their variances, and
        that of the filters' mean.

        Where the mean hardly varies (that of a softmax's head over its classes is zero), a hundredth of what
        independent weights' would is taken for its variance: the penalty would be too stiff for any step.

        The mean of both over layers, times ``preserve``; zero where no quantiles are known.
        """
        chosen = self._chosen(dict(model.named_parameters()), "the model")
        if not self.quantiles:
            return next(iter(chosen.values())).new_zeros(())
        if len(self.quantiles) != 2 * len(chosen):
            raise MismatchError(
                "The model has other layers than the quantiles",
                expected=f"{len(self.quantiles) // 2} layers",
                found=", ".join(chosen),
            )
        total = []
        for w, whole, means in zip(chosen.values(), self.quantiles[::2], self.quantiles[1::2], strict=True):
            values, mean = _seen(w)
            least = _LEAST * float(np.var(whole)) / len(w)
            total += [_distance(values.flatten(), whole), _distance(mean, means, least)]
        return torch.stack(total).mean() * self.preserve

    def read(
        self, mark: WeightsMark, suspect: WeightBox, pool: Batch, *, access: Access, carriers: int,
        queries: int = 0,
    ) -> Reading:  # fmt: skip
        """Read the suspect's weights; ``pool`` and ``carriers`` are not used.

        Raises MismatchError without weights to read, or where the layers are absent or reshaped.
        """
        if access != "white" or not isinstance(suspect, WeightBox):
            raise MismatchError(
                "This mark lies in the weights and needs the model itself",
                expected="white-box access to named weights",
                found=f"{access} access to {suspect.name}",
            )
        mean = self._mean(suspect.weights(), suspect.name).double()
        if not bool(torch.isfinite(mean).all()):
            raise ModelError(f"The weights of {suspect.name} aren't finite", expected="finite numbers")
        return Reading(mark.projection(len(mean)) @ mean, mark.bits.double(), 1, 0, "white")

    def _mean(self, weights: Mapping[str, Tensor], owner: str) -> Tensor:
        """The chosen layers' weights, averaged over filters and laid side by side (length,)."""
        chosen = self._chosen(weights, owner)
        mean = torch.cat([w.flatten(1).mean(0) for w in chosen.values()])
        if self.length and len(mean) != self.length:
            raise MismatchError(
                f"The layers {', '.join(chosen)} of {owner} have another shape",
                expected=f"{self.length} weights a filter",
                found=str(len(mean)),
            )
        return mean

    def _chosen(self, weights: Mapping[str, Tensor], owner: str) -> dict[str, Tensor]:
        found = {n: w for n, w in weights.items() if w.ndim > 1 and w.is_floating_point()}
        for pattern in self.layers:
            if not any(fnmatchcase(name, pattern) for name in found):
                raise MismatchError(
                    f"A layer is missing in {owner}", expected=pattern, found=", ".join(found) or "no weights"
                )
        if not found:
            raise MismatchError(f"There are no weights in {owner}", expected="a matrix or kernel")
        chosen = [n for n in found if any(fnmatchcase(n, p) for p in self.layers)] or [self._middle(found)]
        return {name: found[name] for name in chosen}

    def _middle(self, found: dict[str, Tensor]) -> str:
        sizes = {name: w[0].numel() for name, w in found.items()}
        large = [name for name, size in sizes.items() if size >= self.bits]
        return large[(len(large) - 1) // 2] if large else max(sizes, key=lambda name: sizes[name])


def _seen(w: Tensor) -> tuple[Tensor, Tensor]:
    """What shall look unmarked: all weights of a layer, and the mean of its filters."""
    return w, w.flatten(1).mean(0)


def _quantiles(w: Tensor) -> Tensor:
    """The least, the greatest and evenly spaced quantiles between (_QUANTILES,)."""
    ordered = w.flatten().sort().values
    places = torch.linspace(0, len(ordered) - 1, _QUANTILES, dtype=torch.float64).round().long()
    return ordered[places]


def _distance(w: Tensor, row: tuple[float, ...], least: float = 0.0) -> Tensor:
    """Squared Wasserstein distance of numbers (n,) from those quantiles, relative to their variance, which
    counts as ``least`` at least."""
    ordered = w.sort().values
    places, known = np.linspace(0.0, 1.0, len(w)), np.linspace(0.0, 1.0, len(row))
    wanted = torch.from_numpy(np.interp(places, known, row)).to(ordered)
    return (ordered - wanted).square().mean() / wanted.var(correction=0).clamp_min(max(least, 1e-12))
