"""An API that remembers what it was asked and refuses to tell near twins apart (after Juuti et al. 2019)."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from gradmark.errors import AttackError
from gradmark.protocols import Thief
from gradmark.suspects.checks import unwrap

_ROWS = 2000  # of the thief's inputs whose nearest neighbours are looked for, at most


@dataclass(frozen=True)
class DetectProbes:
    """Inputs nearer to one of the last ``memory`` new ones than natural inputs are get no new answer.

    Near is below ``factor`` times the ``quantile`` of the distances between the thief's inputs and
    their nearest neighbours. ``answer``: ``repeat`` gives the answer of then, so that a central
    difference is zero; ``noise`` leaves its best class and shuffles the scores of the others. Raises
    AttackError where the thief has too few different inputs.
    """

    answer: Literal["repeat", "noise"] = "repeat"
    memory: int = 4096
    factor: float = 1.0
    quantile: float = 0.001

    name = "detect-probes"

    def run(self, model: nn.Module, thief: Thief, generator: torch.Generator) -> nn.Module:
        x = thief.x.flatten(1).float().cpu()  # the memory is kept there
        nearest = _nearest(x, torch.randperm(len(x), generator=generator)[:_ROWS])
        if not len(nearest):
            raise AttackError("The thief's inputs are all the same", fix="give the thief more of them")
        near = self.factor * float(nearest.quantile(self.quantile))
        return Watch(model, generator, x.mean(0), near, self.memory, self.answer == "noise")


class Watch(nn.Module):
    """The model in eval mode behind its memory; rows are watched in order, however they are batched.

    An input that is near one remembered isn't remembered itself. Gradients are those of the model: who
    holds the weights can still read them.
    """

    def __init__(
        self,
        model: nn.Module,
        generator: torch.Generator,
        centre: Tensor,
        near: float,
        size: int,
        noisy: bool,
    ) -> None:
        super().__init__()
        self.model = copy.deepcopy(model)
        self.near, self.size, self.noisy = near, size, noisy
        # no buffers: a reading puts those back, and the memory is to last
        self.centre, self.asked = centre, centre.new_empty(0, len(centre))
        self.answers: Tensor | None = None
        self.noise = torch.Generator().manual_seed(int(torch.randint(2**62, (), generator=generator)))
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = unwrap(self.model(x))
        flat = x.detach().flatten(1).float().cpu() - self.centre  # centred: products lose less
        new = scores.detach().cpu()
        answers = new if self.answers is None else torch.cat([self.answers.to(new), new])
        asked = torch.cat([self.asked, flat])
        twin = self._twins(torch.cdist(flat, asked), len(self.asked))
        given = answers[twin]
        if self.noisy:
            old = twin != torch.arange(len(self.asked), len(asked))
            given[old] = self._shuffled(given[old])
        fresh = torch.arange(len(self.asked), len(asked)) == twin
        kept = torch.cat([torch.ones(len(self.asked), dtype=torch.bool), fresh]).nonzero()[-self.size :, 0]
        self.asked, self.answers = asked[kept], answers[kept]
        given = given.to(scores)
        return given + (scores - scores.detach()) if scores.requires_grad else given

    def _twins(self, distance: Tensor, n: int) -> Tensor:
        """For each new input (b,) the remembered one it is near, or itself; distance (b, n + b)."""
        alive = torch.zeros(distance.shape[1], dtype=torch.bool)
        alive[:n] = True
        order, out = list(range(n)), []  # the memory, oldest first
        for i, row in enumerate(distance):
            least, at = row.masked_fill(~alive, torch.inf).min(0)
            if float(least) < self.near:
                out.append(int(at))
                continue
            out.append(n + i)
            order.append(n + i)
            alive[n + i] = True
            if len(order) > self.size:
                alive[order.pop(0)] = False
        return torch.tensor(out)

    def _shuffled(self, scores: Tensor) -> Tensor:
        """The best class keeps its score; the others' scores (b, C - 1) go round at random."""
        order = torch.rand(scores.shape, generator=self.noise).argsort(1)
        mixed, best = scores.gather(1, order), scores.argmax(1, keepdim=True)
        at = mixed.argmax(1, keepdim=True)
        return mixed.scatter(1, at, mixed.gather(1, best)).scatter(1, best, scores.gather(1, best))


def _nearest(x: Tensor, rows: Tensor) -> Tensor:
    """Distance of some rows of x (n, features) to their nearest neighbours that aren't the same."""
    found = []
    for part in rows.split(256):
        distance = torch.cdist(x[part], x, compute_mode="donot_use_mm_for_euclid_dist")
        found.append(distance.masked_fill(distance == 0, torch.inf).min(1).values)
    nearest = torch.cat(found)
    return nearest[nearest.isfinite()]
