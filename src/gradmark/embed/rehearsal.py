"""A thief who trains on, rehearsed beside the training: the mark is pushed into what he leaves.

A copy of the model gets a last layer drawn anew and is trained on the carriers' labels at a high rate, all
layers of it (RTAL; Adi et al., USENIX Security 2018), for sixteen steps; then there is a new one. What a
penalty asks of the copy is pushed into the model's own weights, as if a step at one were a step at the
other: the first-order shortcut of meta-learning (Finn et al., ICML 2017).
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradmark.embed.evidence import Evidence
from gradmark.embed.heads import replaceable
from gradmark.embed.wrappers import Given, needs_whole_backward, weight_gradients
from gradmark.errors import ModelError, UsageError
from gradmark.protocols import Batch
from gradmark.suspects.checks import brief, unwrap

_LIFE, _SETTLED = 16, 2  # steps of a copy, and how many of them before it is asked: see decision 11
_DECAY = 5e-4


@dataclass(frozen=True)
class Retrained:
    """A thief's copy of the model, and its last layer, which was drawn anew."""

    model: nn.Module
    head: nn.Linear
    optimizer: torch.optim.AdamW

    def carried(self, loss: Tensor, model: nn.Module) -> Tensor:
        """``loss``, of the copy, with its gradients in ``model``'s weights, but for the last layer's."""
        own = {id(p) for p in self.head.parameters()}
        pairs = [
            (p, q)
            for p, q in zip(model.parameters(), self.model.parameters(), strict=True)
            if p.requires_grad and id(q) not in own
        ]
        if not pairs:  # a model that is its last layer, of which the thief kept nothing
            return torch.zeros_like(loss)
        whole = needs_whole_backward(self.model, loss)
        gradients = weight_gradients(loss, [q for _, q in pairs], whole=whole)
        found: Tensor = Given.apply(loss.detach(), *(p for p, _ in pairs), *gradients)  # type: ignore[no-untyped-call]
        return found


class Rehearsal:
    """One thief after another, each from the model as it then is. ``rate``: of his AdamW's first step.

    ``evidence``: what the penalties read in the copies. A copy, its gradients and its optimizer's state are
    four times the weights in memory.
    """

    def __init__(self, mark: Any, rate: float, seed: int) -> None:
        if not 0 < rate < 1:
            raise UsageError(
                "The rehearsed thief's rate makes no sense", expected="0 < rate < 1", found=str(rate)
            )
        self.rate, self.seed, self.age = rate, seed, 0
        self.evidence = Evidence(mark)
        self._thief: Retrained | None = None
        self._state: dict[str, Any] | None = None  # of a resumed run, until the model is known

    def step(self, model: nn.Module, batch: Batch, ready: bool) -> Retrained | None:
        """Let the thief take a step on ``batch``: inputs (b, *shape), labels (b,). He, if he is to be asked.

        ``ready``: whether a new copy may be begun. Model and global random state stay as they are. Raises
        UsageError on what has no last layer to draw anew, ModelError where the copy's training diverges.
        """
        x, labels = batch
        if self.age % _LIFE == 0 and not ready:
            return None
        with torch.random.fork_rng(devices=[x.device] if x.is_cuda else []):
            _seed(self.seed + self.age, x.device)
            thief = self._current(model, batch)
            _seed(self.seed + self.age, x.device)  # again: a new layer is drawn, and when a run resumes
            for group in thief.optimizer.param_groups:
                group["lr"] = self.rate * 0.5 * (1 + math.cos(math.pi * (self.age % _LIFE) / _LIFE))
            thief.optimizer.zero_grad()
            with torch.enable_grad():
                loss = F.cross_entropy(unwrap(thief.model(x)).float(), labels)
                if not bool(torch.isfinite(loss)):
                    raise ModelError("The rehearsed thief's training diverged", fix="lower his rate")
                loss.backward()
            thief.optimizer.step()
            thief.optimizer.zero_grad()
            torch.clear_autocast_cache()  # of the weights before the step
        self.age += 1
        asked = (self.age - 1) % _LIFE >= _SETTLED and self.age % 2 == 1
        return thief if asked else None

    def state_dict(self) -> dict[str, Any]:
        state = {"age": self.age, **self.evidence.state()}
        if self._thief is not None:
            thief = self._thief
            return {**state, "copy": thief.model.state_dict(), "optimizer": thief.optimizer.state_dict()}
        return state if self._state is None else {**self._state, **state}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.evidence.load(state)
        self.age, self._state, self._thief = int(state["age"]), copy.deepcopy(state), None

    def _current(self, model: nn.Module, batch: Batch) -> Retrained:
        if self._thief is not None and self.age % _LIFE:
            return self._thief
        try:
            made = copy.deepcopy(model)
        except Exception as cause:  # a stranger's module may refuse in any way; sharded ones do
            raise _unable(brief(cause)) from cause
        if (head := replaceable(made, batch)) is None:
            raise _unable(type(model).__name__)
        anew = nn.Linear(head.in_features, head.out_features, head.bias is not None)
        with torch.no_grad():
            for p, q in zip(head.parameters(), anew.parameters(), strict=True):
                p.requires_grad_(True).copy_(q)
        trained = [p for p in made.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, self.rate, weight_decay=_DECAY)
        if self._state is not None and "copy" in self._state and self.age % _LIFE:
            made.load_state_dict(self._state["copy"])
            optimizer.load_state_dict(self._state["optimizer"])
        self._thief, self._state = Retrained(made, head, optimizer), None
        return self._thief


def _seed(seed: int, device: torch.device) -> None:
    """The CPU's generator and the device's own: ``torch.manual_seed`` would seed those of all devices."""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(seed)


def _unable(found: str) -> UsageError:
    return UsageError(
        "A thief can't be rehearsed on this model",
        expected="one that can be copied, unsharded, whose class scores leave a linear layer",
        found=found,
        fix="Leave `rehearse` out",
    )
