"""Model extraction: a new network is trained on the stolen one's answers (Hinton et al. 2015)."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradmark.errors import AttackError
from gradmark.protocols import Thief
from gradmark.scores import log_scores
from gradmark.suspects.checks import unwrap
from gradmark.thief import Loss, Student, fit
from gradmark.thief import student as student_of

_WARMUP = 0.1
_ASKED = 512  # inputs at a time


@dataclass(frozen=True)
class Distill:
    """``epochs`` of training on the teacher's answers, at ``lr_factor`` times the thief's rate.

    ``student``: an untrained network of the same (``fresh``) or of another architecture (``other``), or
    the thief's own unmarked network (``sibling``). ``temperature`` softens both sides; ``hard`` takes
    the teacher's best class alone, with ``smoothing`` of those labels. ``surrogate``: ask about inputs
    of another distribution; ``share`` of the inputs are used. ``budget``: 0 asks anew about every
    augmented input of every epoch; else at most so many inputs are asked about, once each.

    Raises AttackError where the thief lacks the student or the inputs.
    """

    epochs: int = 30
    lr_factor: float = 1.0
    temperature: float = 4.0
    student: Student = "fresh"
    surrogate: bool = False
    share: float = 1.0
    budget: int = 0
    hard: bool = False
    smoothing: float = 0.0

    name = "distill"

    def run(self, model: nn.Module, thief: Thief, generator: torch.Generator) -> nn.Module:
        teacher = copy.deepcopy(model).eval().requires_grad_(False)
        student = student_of(thief, generator, self.student)
        x = self._inputs(thief, generator)
        answers = _ask(teacher, x) if self.budget else torch.zeros(len(x), 0)
        fit(
            student,
            thief,
            generator,
            epochs=self.epochs,
            lr=self.lr_factor * thief.lr,
            loss=self._loss(None if self.budget else teacher),
            data=(x, answers),
            warmup=0.0 if self.student == "sibling" else _WARMUP,
        )
        return student

    def _inputs(self, thief: Thief, generator: torch.Generator) -> Tensor:
        """The inputs (n, *shape) to ask about, in random order."""
        x = thief.surrogate if self.surrogate else thief.x
        if x is None:
            raise AttackError("The thief has no other inputs", fix="give Thief.surrogate")
        n = max(1, round(self.share * len(x)))
        return x[torch.randperm(len(x), generator=generator)[: min(n, self.budget or n)]]

    def _loss(self, teacher: nn.Module | None) -> Loss:
        """From a batch and its answers; ``teacher``: asked anew about each batch."""

        def loss(student: nn.Module, x: Tensor, answers: Tensor) -> Tensor:
            logits = unwrap(student(x)).float()
            told = answers if teacher is None else _ask(teacher, x)
            if self.hard:
                return F.cross_entropy(logits, told.argmax(1), label_smoothing=self.smoothing)
            target = (told / self.temperature).log_softmax(1)
            given = (logits / self.temperature).log_softmax(1)
            # times the temperature squared, so that the gradient's size hardly depends on it
            return self.temperature**2 * F.kl_div(given, target, reduction="batchmean", log_target=True)

        return loss


@dataclass(frozen=True)
class HardLabels(Distill):
    """:class:`Distill` from the teacher's best class alone, as an API that tells no more allows."""

    hard: bool = True

    name = "hard-labels"


@dataclass(frozen=True)
class Knockoff(Distill):
    """Knockoff nets by random choice (Orekondy et al. 2019): other inputs, each asked about once."""

    temperature: float = 1.0
    surrogate: bool = True
    budget: int = 30_000

    name = "knockoff"


@torch.no_grad()
def _ask(teacher: nn.Module, x: Tensor) -> Tensor:
    """The teacher's scores (b, C) as float32 logits, be they logits or probabilities."""
    answers = torch.cat([unwrap(teacher(part)) for part in x.split(_ASKED)])
    return log_scores(answers, answers.shape[1]).float()
