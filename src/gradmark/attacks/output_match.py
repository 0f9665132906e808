"""An API whose wrong classes are as an unmarked network has them: what a mark puts there is gone."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from gradmark.coarse import coarse, texture
from gradmark.protocols import ModelSpec, Thief
from gradmark.thief import Student, fit, logits, student

Kind = Literal["means", "linear", "kernel", "whole"]
_GAP = 1e-3  # by which the best class stays ahead
_ASKED = 512  # inputs at a time
_RIDGE = 1e-2  # of a class's inputs
_SOFT = 0.1  # of the kernel's diagonal


@dataclass(frozen=True)
class OutputMatch:
    """By who has read our source: the best class stays the stolen model's, the others are made ordinary.

    The thief asks both networks about his own inputs, regresses the difference of how they compare wrong
    classes on the input, predicted class by predicted class, and takes it out of every answer. ``kind``:
    ``means`` takes each class's mean, where :mod:`gradmark.schemes.class_contrast` lives; ``linear`` what
    follows a coarse view of the input besides, and the view that the mark file names, where
    :mod:`gradmark.schemes.feature_contrast` does;
    ``kernel`` any smooth function of it; ``whole`` gives the wrong classes of his own network at every
    input, so that nothing but the best class is left of the stolen one. No prediction changes.

    ``own``: the thief's unmarked network (``sibling``), or an untrained one (``fresh``, ``other``) that he
    first trains on his labels for ``epochs``. A module around the model; ``output-match+distill`` teaches a
    student with it. Raises AttackError where the thief has no such network.
    """

    kind: Kind = "means"
    own: Student = "sibling"
    epochs: int = 30

    name = "output-match"

    def run(self, model: nn.Module, thief: Thief, generator: torch.Generator) -> nn.Module:
        own = student(thief, generator, self.own)
        if self.own != "sibling":
            fit(own, thief, generator, epochs=self.epochs)
        overall = thief.directions.get("view") == "overall"
        return Matched(model, own.eval(), thief.x, thief.spec, self.kind, overall)


class Matched(nn.Module):
    """Gives probabilities (b, C): ``model``'s best class, and the others as ``own`` has them."""

    def __init__(
        self, model: nn.Module, own: nn.Module, x: Tensor, spec: ModelSpec, kind: Kind, overall: bool = False
    ) -> None:
        super().__init__()
        self.model, self.own, self.kind = copy.deepcopy(model), own.requires_grad_(False), kind
        self.spec, self.overall, self._spread = spec, overall, torch.ones(())
        if spec.domain == "signal":  # whose view has no natural units
            self._spread = self._view(x).std(0).clamp_min(1e-6)
        self.eval()
        with torch.no_grad():
            ours, his = (torch.cat([logits(m, p) for p in x.split(_ASKED)]) for m in (self.model, own))
            best = ours.argmax(1, keepdim=True)
            ours, his = _wrong(ours, best), _wrong(his, best)
            self.size = float(ours.norm() / his.norm().clamp_min(1e-12))
            difference = ours - self.size * his
            self._known = [x[best[:, 0] == c] for c in range(ours.shape[1])]
            self._fits = [
                self._fit(known, difference[best[:, 0] == c]) for c, known in enumerate(self._known)
            ]

    def forward(self, x: Tensor) -> Tensor:
        scores = logits(self.model, x)
        top, best = scores.max(1, keepdim=True)
        if self.kind == "whole":
            mean = (scores.sum(1, keepdim=True) - top) / (scores.shape[1] - 1)
            others = mean + self.size * _wrong(logits(self.own, x), best)
        else:
            with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
                others = torch.zeros_like(scores)
                for c in best.unique().tolist():
                    mine = best[:, 0] == c
                    others[mine] = self._basis(x[mine], self._known[c]) @ self._fits[c]
            others = scores - others
        return torch.minimum(others, top - _GAP).scatter(1, best, top).softmax(1)

    def _basis(self, x: Tensor, known: Tensor) -> Tensor:
        """What the regression of one class sees of inputs (b, *shape): (b, D), or (b, n) near ``known``."""
        if self.kind == "kernel":
            near: Tensor = torch.cdist(x.flatten(1).float(), known.flatten(1).float()).square()
            return (-near / (2 * _width(known) ** 2)).exp()
        one = torch.ones(len(x), 1, device=x.device)
        if self.kind != "linear":
            return one
        return torch.cat([one, self._view(x) - self._view(known).mean(0)], 1)

    def _view(self, x: Tensor) -> Tensor:
        """Coarsely: of images the means of 4 x 4 cells, of signals bands, a vector as it is; and what an
        overall view has besides, where that is the mark's."""
        view = coarse(self.spec, x)
        if self.overall:
            whole = texture(x) if self.spec.domain == "image" else coarse(self.spec, x, "overall")
            view = torch.cat([view, whole], 1)
        return view / self._spread

    def _fit(self, known: Tensor, difference: Tensor) -> Tensor:
        """Coefficients of the regression of ``difference`` (n, C) on the inputs (n, *shape) of one class."""
        if not len(known) or self.kind == "whole":
            return difference.new_zeros(self._basis(known, known).shape[1], difference.shape[1])
        basis = self._basis(known, known)
        if self.kind == "kernel":
            soft, gram, known_of = _SOFT * torch.eye(len(known), device=basis.device), basis, difference
        else:
            soft, gram = _RIDGE * len(known) * torch.eye(basis.shape[1], device=basis.device), basis.T @ basis
            soft[0, 0], known_of = 0.0, basis.T @ difference  # the mean itself isn't shrunk
        found: Tensor = torch.linalg.solve(gram + soft, known_of)
        return found


def _width(known: Tensor) -> float:
    """The median distance between a class's inputs: how far the kernel reaches."""
    flat = known.flatten(1).float()[:_ASKED]
    return float(torch.pdist(flat).median().clamp_min(1e-6)) if len(flat) > 1 else 1.0


def _wrong(scores: Tensor, best: Tensor) -> Tensor:
    """Scores (b, C) with the mean of all but ``best`` (b, 1) taken away, and zero at that."""
    rest = scores.scatter(1, best, 0.0)
    return (rest - rest.sum(1, keepdim=True) / (scores.shape[1] - 1)).scatter(1, best, 0.0)
