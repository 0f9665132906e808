"""Sensitive probes: inputs at which any small change of the weights shows in the answers.

At a probe the model's best classes are tied but for a margin that honest arithmetic can't cross, and no class
is out of reach: there the scores follow the logits as closely as they can, and the label hangs on a thread. A
tie of k classes keeps its label under a random movement of the logits in one case of k only. Of many
candidates, those are taken whose gradients with respect to the parameters complement one another, so
that each weight moves the answer at some probe (He, Zhang and Lee, CVPR 2019, maximise that gradient's norm).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gradmark.errors import ModelError
from gradmark.inputs import secret_inputs
from gradmark.keys import OwnerKey
from gradmark.protocols import ModelSpec
from gradmark.seal.answers import Form

TIED = 4
_RATE, _STEPS = 0.03, 30
_GAP, _REACH = 0.7, 2.5  # logits by which the other classes stay below a tie: at least, at most
_LARGE, _OF_ONE = 10, 1024  # the largest tenth of a tensor's weights is looked at, of large tensors so many
_VISIBLE = 1e-3  # logits: what shows in four decimals, and beyond the margin of a tie


@dataclass(frozen=True)
class Probes:
    """Sensitive inputs ``x`` (n, *shape), the sealed ``scores`` (n, C) float64, and what they can tell.

    ``anchors`` (m, *shape), ``anchor_scores``: ordinary inputs, asked to see whether a model whose probes
    are off is related at all. ``tolerance``: twice the logits by which honest arithmetic may move a score.
    ``sensitivity``: for each weight tensor, the root mean square by which centred logits at the probes move
    per unit of relative noise on it.
    """

    x: Tensor
    scores: Tensor
    anchors: Tensor
    anchor_scores: Tensor
    form: Form
    tolerance: float
    sensitivity: dict[str, float]


def detection_limit(probes: Probes, form: Form, decimals: int | None = None) -> float | None:
    """Relative noise on the least sensitive weight tensor that moves the answers beyond doubt.

    Beyond doubt: by a unit of the last decimal in the root mean square over probes and classes, or,
    for labels, by three times the gap of the tied classes. None where a tensor moves no answer at all.
    """
    least = min(probes.sensitivity.values(), default=0.0)
    if least <= 0:
        return None
    unit = 0.0 if decimals is None else 10.0**-decimals
    z = probes.scores.clamp_min(1e-30).log() if probes.form == "probabilities" else probes.scores
    wanted = unit + 2 * probes.tolerance
    if form == "labels":
        top = z.topk(2, 1).values
        wanted = 3 * float((top[:, 0] - top[:, 1]).median())
    elif form == "probabilities":
        wanted = unit / float(z.softmax(1).square().mean().sqrt()) + 2 * probes.tolerance
    return wanted / least


@dataclass(frozen=True)
class Ties:
    """Which classes are tied at which candidate: ``first`` (n, k) with the leader in column 0, ``rest``."""

    first: Tensor
    rest: Tensor

    @classmethod
    def draw(cls, n: int, n_classes: int, generator: torch.Generator) -> Ties:
        """Each class leads equally often; those beside it are drawn."""
        order = torch.stack([torch.randperm(n_classes, generator=generator) for _ in range(n)])
        lead = torch.arange(n)[:, None] % n_classes
        order = torch.cat([lead, order[order != lead].reshape(n, n_classes - 1)], 1)
        k = min(TIED, n_classes)
        return cls(order[:, :k], order[:, k:])

    def at(self, index: Tensor) -> Ties:
        return Ties(self.first[index], self.rest[index])

    def gaps(self, z: Tensor) -> Tensor:
        """The leader's logits minus those of the classes tied with it (n, k-1), of logits (n, C)."""
        tied = z.gather(1, self.first)
        return tied[:, :1] - tied[:, 1:]

    def loss(self, z: Tensor) -> Tensor:
        """Zero (n,) where all ties hold and the other classes are within reach below them."""
        lead, rest = z.gather(1, self.first[:, :1]), z.gather(1, self.rest)
        below = (rest - lead + _GAP).relu().square() + (lead - _REACH - rest).relu().square()
        return self.gaps(z).square().sum(1) + below.sum(1)


def starts(key: OwnerKey, spec: ModelSpec, n: int, context: bytes, natural: Tensor | None) -> Tensor:
    """(n, *shape) legal inputs to start from: keyed noise of many kinds, or blends of natural inputs.

    Smooth to white, faint to harsh, dark to bright: units that one kind never wakes, another does.
    """
    mix = torch.from_numpy(key.integers("seal-mix", 3 * n, 1 << 20, context=context)).reshape(3, n)
    grain, contrast, light = (mix.float() / (1 << 20)).reshape(3, n, *([1] * len(spec.input_shape)))
    if natural is not None and len(natural) > 1:
        order = torch.from_numpy(key.integers("seal-data", 2 * n, len(natural), context=context))
        first, second = natural[order[:n]], natural[order[n:]]
        return spec.snap(first + 0.6 * grain * (second - first))
    smooth = secret_inputs(key, spec, n, purpose="seal-smooth", context=context)
    white = torch.from_numpy(key.normals("seal-white", (n, *spec.input_shape), context=context)).float()
    if spec.low is None or spec.high is None:
        free: Tensor = (1 - grain) * smooth + grain * white * spec.scale
        return free
    middle, half = (spec.low + spec.high) / 2, (spec.high - spec.low) / 2
    x = (1 - grain) * smooth + grain * (middle + half * white.clamp(-2, 2) / 2)
    return spec.snap((x - middle) * (0.5 + 2 * contrast) + middle + half * (2 * light - 1) * 0.8)


def tied(
    score: Callable[[Tensor], Tensor], x: Tensor, ties: Ties, spec: ModelSpec,
    report: Callable[[int, int], None] = lambda done, total: None,
) -> Tensor:  # fmt: skip
    """Candidates (n, *shape) moved by Adam until their ties nearly hold; ``score`` gives logits (n, C)."""
    x = x.clone().requires_grad_(True)
    size = spec.scale if spec.low is None or spec.high is None else spec.high - spec.low
    optimizer = torch.optim.Adam([x], lr=_RATE * size)
    for step in range(_STEPS):
        loss = ties.loss(score(x)).sum()
        optimizer.zero_grad()
        loss.backward(inputs=[x])
        optimizer.step()
        with torch.no_grad():
            x.copy_(within(x, spec))
        report(step + 1, _STEPS)
    return x.detach()


def within(x: Tensor, spec: ModelSpec) -> Tensor:
    """``x`` with what is out of bounds moved onto them."""
    if spec.low is not None:
        x = x.clamp_min(spec.low)
    return x if spec.high is None else x.clamp_max(spec.high)


def effects(
    score: Callable[[Tensor], Tensor], module: nn.Module, x: Tensor, ties: Ties
) -> tuple[Tensor, Tensor, Tensor]:
    """Which large weights' sign flips show at which candidate, to first order.

    In the scores (n, W) and in the label (n, W), booleans; and each weight's share (W,) of its tensor.
    """
    weights = [p for p in module.parameters() if p.ndim > 1 and p.requires_grad]
    if not weights:
        raise ModelError("The model has no weight matrices", fix="Seal it without probes: --probes 0")
    chosen = [p.detach().abs().flatten().topk(min(_OF_ONE, max(1, p.numel() // _LARGE))).indices
              for p in weights]  # fmt: skip
    share = torch.cat([torch.full((len(c),), 1 / len(c) / len(chosen)) for c in chosen])
    shown, labels = [], []
    for i in range(len(x)):
        z = score(x[i : i + 1])[0]
        flips = []
        for column in ties.first[i].tolist():
            grads: tuple[Tensor | None, ...] = torch.autograd.grad(
                z[column], weights, retain_graph=True, allow_unused=True
            )
            moved = [torch.zeros(len(c)) if g is None else (-2 * g * p.detach()).flatten()[c].float()
                     for g, p, c in zip(grads, weights, chosen, strict=True)]  # fmt: skip
            flips.append(torch.cat(moved))
        flip = torch.stack(flips)
        shown.append((flip.abs() > _VISIBLE).any(0))
        labels.append((flip[1:] - flip[:1] > _VISIBLE).any(0))
    return torch.stack(shown), torch.stack(labels), share


def complementary(shown: Tensor, labels: Tensor, share: Tensor, lead: Tensor, n: int) -> Tensor:
    """``n`` candidates, greedily those that show most of what others don't; leaders differ if possible."""
    once, twice = (torch.zeros(shown.shape[1], dtype=torch.bool) for _ in range(2))
    label = once.clone()
    taken: list[int] = []
    for _ in range(min(n, len(lead))):
        used = torch.bincount(lead[taken], minlength=int(lead.max()) + 1)
        free = [i for i in range(len(lead)) if i not in taken and used[lead[i]] == used[lead].min()] or [
            i for i in range(len(lead)) if i not in taken
        ]
        gain = (shown & ~once).float() + 0.2 * (shown & ~twice).float() + (labels & ~label).float()
        value = gain @ share
        best = max(free, key=lambda i: float(value[i]))
        taken.append(best)
        twice |= once & shown[best]
        once |= shown[best]
        label |= labels[best]
    return torch.tensor(taken)


__all__ = ["Probes", "Ties", "complementary", "detection_limit", "effects", "starts", "tied", "within"]
