"""An API whose wrong classes are as an unmarked network has them: what a mark puts there is gone."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gradmark.protocols import Thief
from gradmark.thief import Student, fit, logits, student

_GAP = 1e-3  # by which the best class stays ahead
_ASKED = 512  # inputs at a time


@dataclass(frozen=True)
class OutputMatch:
    """By who has read our source: the best class stays the stolen model's, the others are made ordinary.

    The thief compares how the wrong classes of both networks compare, predicted class by predicted class, on
    his own inputs, and adds the difference of the means to every answer: a mark that lives in such means
    (:mod:`gradmark.schemes.class_contrast`) is gone. With ``whole`` the wrong classes are his own
    network's at every input, so nothing but the best class is left of the stolen one. Either way no
    prediction changes. ``own``: the thief's unmarked network (``sibling``), or an untrained one
    (``fresh``, ``other``) that he first trains on his labels for ``epochs``.

    A module around the model; ``output-match+distill`` teaches a student with it. Raises AttackError
    where the thief has no such network.
    """

    whole: bool = False
    own: Student = "sibling"
    epochs: int = 30

    name = "output-match"

    def run(self, model: nn.Module, thief: Thief, generator: torch.Generator) -> nn.Module:
        own = student(thief, generator, self.own)
        if self.own != "sibling":
            fit(own, thief, generator, epochs=self.epochs)
        return Matched(model, own.eval(), thief.x, self.whole)


class Matched(nn.Module):
    """Gives probabilities (b, C): ``model``'s best class, and the others as ``own`` has them."""

    shift: Tensor

    def __init__(self, model: nn.Module, own: nn.Module, x: Tensor, whole: bool) -> None:
        super().__init__()
        self.model, self.own, self.whole = copy.deepcopy(model), own.requires_grad_(False), whole
        self.eval()
        with torch.no_grad():
            ours, his = _patterns(self.model, x), _patterns(own, x)
        both = (ours.norm(dim=1, keepdim=True) > 0) & (his.norm(dim=1, keepdim=True) > 0)
        size = ours.norm(dim=1, keepdim=True) / his.norm(dim=1, keepdim=True).clamp_min(1e-12)
        self.register_buffer("shift", torch.where(both, his * size - ours, torch.zeros_like(ours)))
        self.size = float(ours.norm() / his.norm().clamp_min(1e-12))

    def forward(self, x: Tensor) -> Tensor:
        scores = logits(self.model, x)
        top, best = scores.max(1, keepdim=True)
        if self.whole:
            mean = (scores.sum(1, keepdim=True) - top) / (scores.shape[1] - 1)
            others = mean + self.size * _wrong(logits(self.own, x), best)
        else:
            others = scores + self.shift[best[:, 0]]
        return torch.minimum(others, top - _GAP).scatter(1, best, top).softmax(1)


def _wrong(scores: Tensor, best: Tensor) -> Tensor:
    """Scores (b, C) with the mean of all but ``best`` (b, 1) taken away, and zero at that."""
    rest = scores.scatter(1, best, 0.0)
    return (rest - rest.sum(1, keepdim=True) / (scores.shape[1] - 1)).scatter(1, best, 0.0)


def _patterns(model: nn.Module, x: Tensor) -> Tensor:
    """By predicted class, the mean (C, C) of how the wrong ones compare; zero for one never predicted."""
    scores = torch.cat([logits(model, part) for part in x.split(_ASKED)])
    best = scores.argmax(1, keepdim=True)
    total = scores.new_zeros(scores.shape[1], scores.shape[1]).index_add(0, best[:, 0], _wrong(scores, best))
    return total / torch.bincount(best[:, 0], minlength=scores.shape[1]).clamp_min(1)[:, None]
