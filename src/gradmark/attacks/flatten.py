"""Adaptive attacks by one who read our source but lacks the key: flat along directions of our family.

The thief draws throwaway keys, so his directions are of the owner's kind but not the owner's.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradmark.carriers import Directions, capacity, keyed_directions
from gradmark.errors import AttackError, UsageError
from gradmark.keys import OwnerKey
from gradmark.protocols import Thief
from gradmark.thief import fit, label_loss, logits, penalty_mode

_PER_STEP = 16  # fresh directions in each step, shared by its inputs
_FAMILY = {"step": 8 / 255, "kernel_size": 5, "whitening": 1.0}
"""The scheme's defaults, for a thief who hasn't seen the mark file."""
_MOST = 1024  # directions that a mean is kept of


@dataclass(frozen=True)
class Flatten:
    """Labels, and ``weight`` times the mean square of every input's own response to a random direction.

    The response is half the difference of the logits at both ends of ``x`` plus and minus the
    direction, the right class left out and the mean removed: all contrasts of wrong classes at once.
    ``step``, ``kernel_size``: as in :mod:`gradmark.carriers`; 0: the thief's, who has read the mark file, or
    8/255 and 5 where he hasn't. New directions are drawn in each step. ``clip``: the gradient's greatest
    norm; without it the penalty's first steps can make the model a constant.
    """

    weight: float = 1.0
    step: float = 0.0
    kernel_size: int = 0
    clip: float = 1.0
    epochs: int = 5
    lr_factor: float = 1.0

    name = "flatten"

    def run(self, model: nn.Module, thief: Thief, generator: torch.Generator) -> nn.Module:
        attacked = copy.deepcopy(model)

        def loss(model: nn.Module, x: Tensor, labels: Tensor) -> Tensor:
            directions = _directions(thief, generator, _PER_STEP, self.kernel_size, self.step)
            d, _ = _one(directions, x, generator)
            response = _response(model, x, labels, d)
            return label_loss(model, x, labels) + self.weight * response.square().sum(1).mean()

        lr = self.lr_factor * thief.lr
        fit(attacked, thief, generator, epochs=self.epochs, lr=lr, loss=loss, clip=self.clip)
        return attacked


@dataclass(frozen=True)
class SubtractMean:
    """Labels, and ``weight`` times the squared *mean* response to each of ``directions`` fixed directions.

    0 of them: as many as there are of that size, so that none of the owner's lies outside of their span.

    A mark lives in the mean over inputs, so driving that to zero costs the model less than flattening
    every input. The mean is estimated on the thief's inputs first; each step mixes the batch's share
    ``fresh`` into it and pushes the mixture to zero. ``clip``: as in :class:`Flatten`.
    """

    weight: float = 3.0
    directions: int = 0
    fresh: float = 0.1
    step: float = 0.0
    kernel_size: int = 0
    clip: float = 1.0
    epochs: int = 5
    lr_factor: float = 1.0

    name = "subtract-mean"

    def run(self, model: nn.Module, thief: Thief, generator: torch.Generator) -> nn.Module:
        attacked = copy.deepcopy(model).eval()
        basis = _directions(thief, generator, self.directions, self.kernel_size, self.step)
        mean = self._estimate(attacked, thief, basis, generator)

        def loss(model: nn.Module, x: Tensor, labels: Tensor) -> Tensor:
            d, index = _one(basis, x, generator)
            now, seen = _mean_by(_response(model, x, labels, d), index, basis.n)
            # Value and gradient of the running mean's square, as if the batch's share were all of it.
            mixed = torch.where(seen, (1 - self.fresh) * mean + self.fresh * now, mean)
            mean.copy_(mixed.detach())
            return label_loss(model, x, labels) + self.weight / self.fresh * mixed.square().sum(1).mean()

        lr = self.lr_factor * thief.lr
        fit(attacked, thief, generator, epochs=self.epochs, lr=lr, loss=loss, clip=self.clip)
        return attacked

    def _estimate(
        self, model: nn.Module, thief: Thief, basis: Directions, generator: torch.Generator
    ) -> Tensor:
        """Mean response (K, C) of the model over the thief's inputs, one direction for each."""
        responses, indices = [], []
        with torch.no_grad():
            for x, labels in zip(thief.x.split(256), thief.labels.split(256), strict=True):
                d, index = _one(basis, x, generator)
                responses.append(_response(model, x, labels, d))
                indices.append(index)
        return _mean_by(torch.cat(responses), torch.cat(indices), basis.n)[0]


@dataclass(frozen=True)
class SelfDistill:
    """Labels, and ``weight`` times the divergence to the stolen model's own smoothed answers.

    Its probabilities are averaged over ``samples`` pairs of opposite random directions; the student
    answers at yet another one, so that the function becomes constant along them.
    """

    weight: float = 1.0
    samples: int = 4
    step: float = 0.0
    kernel_size: int = 0
    epochs: int = 5
    lr_factor: float = 1.0

    name = "self-distill"

    def run(self, model: nn.Module, thief: Thief, generator: torch.Generator) -> nn.Module:
        attacked, teacher = copy.deepcopy(model), copy.deepcopy(model).eval()

        def loss(model: nn.Module, x: Tensor, labels: Tensor) -> Tensor:
            directions = _directions(thief, generator, _PER_STEP, self.kernel_size, self.step)
            draw = [_one(directions, x, generator)[0] for _ in range(self.samples + 1)]
            with torch.no_grad():
                ends = torch.cat([x + sign * d for d in draw[1:] for sign in (1, -1)])
                target = logits(teacher, ends).softmax(1).unflatten(0, (-1, len(x))).mean(0)
            # The student sees the input itself for the labels, and a nudged one for the smoothing.
            with penalty_mode(model):
                said = logits(model, x + draw[0]).log_softmax(1)
            return label_loss(model, x, labels) + self.weight * F.kl_div(said, target, reduction="batchmean")

        fit(attacked, thief, generator, epochs=self.epochs, lr=self.lr_factor * thief.lr, loss=loss)
        return attacked


def _directions(
    thief: Thief, generator: torch.Generator, n: int, kernel_size: int, step: float
) -> Directions:
    """Directions of a throwaway key, as many as the input has, at most ``n`` unless that is 0."""
    given = {"step": step, "kernel_size": kernel_size}
    known = {k: v for k, v in thief.directions.items() if k != "view"}
    family = {**_FAMILY, **known, **{k: v for k, v in given.items() if v}}
    key = OwnerKey.from_seed(int(torch.randint(2**62, (), generator=generator)), "thief")
    try:
        return keyed_directions(
            key,
            thief.spec,
            n=min(n or _MOST, capacity(thief.spec, family["kernel_size"])),
            groups=1,
            context=b"",
            **family,
        )
    except UsageError as cause:
        raise AttackError("The inputs have no directions of that size", found=cause.found) from cause


def _one(directions: Directions, x: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """A random direction (b, *shape) at each input, and its number (b,)."""
    index = torch.randint(directions.n, (len(x),), generator=generator).to(x.device)
    return directions.one(x, torch.zeros_like(index), index), index


def _response(model: nn.Module, x: Tensor, labels: Tensor, d: Tensor) -> Tensor:
    """Half the logits' difference between ``x + d`` and ``x - d`` (b, C), wrong classes compared.

    With two classes there is but one wrong one: then both are compared, as the scheme does.
    """
    with penalty_mode(model):
        plus, minus = logits(model, torch.cat([x + d, x - d])).chunk(2)
    half = (plus - minus) / 2
    counts = torch.ones_like(half)
    if half.shape[1] > 2:
        counts = counts.scatter(1, labels[:, None], 0.0)
    return (half - (half * counts).sum(1, keepdim=True) / counts.sum(1, keepdim=True)) * counts


def _mean_by(values: Tensor, index: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """Mean (n, C) of the rows (b, C) that share a number, and which numbers there are (n, 1)."""
    total = values.new_zeros(n, values.shape[1]).index_add(0, index, values)
    count = torch.bincount(index, minlength=n)[:, None]
    return total / count.clamp_min(1), count > 0
