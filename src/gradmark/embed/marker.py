"""One line in anybody's training loop: ``loss = task_loss + marker.penalty(model, batch)``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradmark.embed.balance import Balance, check_strength, norms
from gradmark.embed.discreet import Discreet, discreetly
from gradmark.embed.evidence import Evidence
from gradmark.embed.heads import NewHead, answered
from gradmark.embed.modes import penalty_mode
from gradmark.embed.preflight import check_method_name, choose_method
from gradmark.embed.ranks import Ranks
from gradmark.embed.rehearsal import Rehearsal
from gradmark.embed.shared import from_scores, rides, shared
from gradmark.embed.soft_labels import KeyedLabels
from gradmark.embed.soften import check_soften, unlikeness
from gradmark.embed.status import MarkStatus
from gradmark.embed.wrappers import at_once, bare, lasting, sharded
from gradmark.errors import ModelError, UsageError
from gradmark.keys import OwnerKey
from gradmark.protocols import Batch, ModelSpec, Scheme, TestName
from gradmark.views import View

STRENGTH_PER_POINT = 0.6
"""Gradient-norm ratio spent per point of accuracy budget; ``benchmarks/`` has the measured front."""
_BALANCE_EVERY = 16  # penalties between two looks at the gradient norms
_PLACED = 0.1  # mean shortfall of its bits, in margins, at which a part counts as placed
_REST = 8  # penalties between two looks at a part that is placed
_FIRST = 1 / 3  # mean shortfall, in margins, below which a new head may claim some of the push
_HEADROOM = 4.0


class Marker:
    """Carries the mark into a model while somebody else's loop trains it.

    The user states a ``target_log10_p`` (by default the scheme's) and an accuracy ``budget`` in points.
    The budget sets the greatest ratio of the penalty's gradient norm to the task's; the weight follows
    both norms. When the evidence on the training batches passes the target the push relaxes, and returns
    when it fades. ``strength`` sets the ratio by hand, ``weight`` fixes the penalty's factor outright.

    ``carriers`` inputs of each batch carry the penalty, on every ``every``-th step. ``margin`` is
    the mean reading, in logits and less what is natural, at which a bit counts as placed (by default
    the scheme's). ``method`` is ``exact`` (double backward), ``central-difference`` or ``auto``: the
    preflight on the first batch picks, or raises PreflightError. ``task_loss`` maps (scores, labels) to
    the task's loss. ``lean`` takes the penalty's gradient at once, part by part, and lets its graph go: call
    ``penalty`` before the task's forward pass, and a step's peak memory is hardly more than the task's.
    ``ease`` leaves out the parts of a mark that are placed, but for every eighth penalty, which sees
    whether they fade. ``new_heads`` takes a quarter of the penalties, once two thirds of the margins are
    met, through a last layer trained anew (:mod:`gradmark.embed.heads`; by default as the scheme has it).
    ``rehearse``: the rate of a thief who retrains copies of the model from then on, which are asked too
    (:mod:`gradmark.embed.rehearsal`); AdamW's, as high as your own. ``soften``: the weight with which blurred
    and faded carriers are to be answered as they are themselves (:mod:`gradmark.embed.soften`).
    ``keyed_labels``: that the task is trained on :meth:`soft_labels`, ``beside`` the push of what they carry,
    or ``alone``, which leaves the push to the other parts.

    Where a process group is running, all its processes make the same calls and carry one mark together
    (:mod:`gradmark.embed.ranks`): ``carriers`` counts the inputs of all of them. Add the penalty to the
    task's loss and call ``backward`` once, since DDP reduces nothing that comes by another backward pass.
    """

    def __init__(
        self,
        scheme: Scheme,
        key: OwnerKey,
        spec: ModelSpec,
        *,
        target_log10_p: float | None = None,
        budget: float = 0.5,
        strength: float | None = None,
        weight: float | None = None,
        carriers: int = 32,
        every: int = 4,
        margin: float | None = None,
        method: str = "auto",
        lean: bool = False,
        ease: bool = False,
        new_heads: bool | None = None,
        rehearse: float | None = None,
        soften: float = 0.0,
        keyed_labels: str = "",
        test: TestName = "signed-rank",
        seed: int = 0,
        task_loss: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy,
    ) -> None:
        check_method_name(method)
        margin = float(getattr(scheme, "margin", 0.3)) if margin is None else margin
        aim = getattr(scheme, "target_log10_p", -15.0) if target_log10_p is None else target_log10_p
        check_strength(aim, budget, margin, carriers, every, strength, weight)
        check_soften(soften, spec)
        self.scheme, self.spec, self.test, self.soften = scheme, spec, test, soften
        self.mark = scheme.mark(key, spec)
        self.target_log10_p, self.margin, self.carriers, self.every = float(aim), margin, carriers, every
        self.strength = budget * STRENGTH_PER_POINT if strength is None else strength
        self.fixed_weight, self.method, self.lean, self.ease = weight, method, lean, ease
        self.labels = KeyedLabels(scheme, self.mark, margin, keyed_labels) if keyed_labels else None
        self.task_loss, self.generator = task_loss, torch.Generator().manual_seed(seed)
        wanted = bool(getattr(scheme, "new_heads", False)) if new_heads is None else new_heads
        self.head = NewHead(seed) if wanted else None
        self.rehearsal = None if rehearse is None else Rehearsal(self.mark, rehearse, seed)
        self.evidence, self._through_head = Evidence(self.mark), Evidence(self.mark)
        self.parts, self.balance = self.evidence.sizes, Balance()
        self._steps, self._penalties, self._recomputes = 0, 0, False

    def __repr__(self) -> str:
        return f"Marker({self.scheme!r}, strength={self.strength}, method={self.method!r})"

    def penalty(self, model: nn.Module, batch: Batch, scores: Tensor | None = None) -> Tensor:
        """Scalar to add to the task loss of ``batch``: inputs (b, *shape), labels (b,).

        ``model`` gives class scores, or is a :class:`~gradmark.views.View` of any other: the batch is
        then the task's own, whose carriers the penalty rides on. ``scores`` (b, C): the model's answers to
        the whole batch, with their graph, which spare some parts a pass (:mod:`gradmark.embed.shared`).

        Zero on the steps between two penalties, and where the scheme rides on some inputs only and the
        batch holds none. Mode, batch-norm statistics and the global random state stay. Raises, on the first
        call, PreflightError if no right gradient can be had, MismatchError where inputs aren't on the spec's
        scale; ModelError where answers are not finite.
        """
        device = batch[0].device
        step, self._steps = self._steps, self._steps + 1
        if step % self.every:
            return torch.zeros((), device=device)
        ranks, model = Ranks.here(), bare(model)
        own = ranks.gathered(batch, self.carriers)
        some = model.task.carriers(own) if isinstance(model, View) else own
        if not rides(self.scheme, self.mark, some[1]):
            return torch.zeros((), device=device)
        if self.method == "auto" or self._penalties == 0:
            check = choose_method(self.scheme, self.mark, model, some, self.method)
            self.method, self._recomputes = check.method, check.recomputes
        balancing = self._penalties % _BALANCE_EVERY == 0
        share = self.method != "exact" and not balancing and not isinstance(model, View)
        told = None if balancing or self.lean or self._recomputes else shared(scores, batch, model, ranks)
        if self.labels:
            how = self.method if balancing else None
            self.labels.at_penalty(model, some, self.evidence, self.generator, how)
        if not (due := self._due(balancing, told)):
            self._penalties += 1
            return torch.zeros((), device=device)
        with (
            penalty_mode(model, self.method),
            self._asking(model, own, balancing) as seen,
            ranks.sharing(model, share),
        ):
            if seen is not self.evidence:  # but another last layer, which learns no keyed labels
                told, due = None, sorted({*due, *self._labelled()})
            # What is checkpointed runs again in the backward pass, which has to come in this mode.
            if now := (self.lean or self._recomputes) and not sharded(model):
                loss, norm = at_once(self._one_by_one(model, some, due, seen), model)
            else:
                loss, norm = self._pull(model, some, due, seen, told), None
                loss = discreetly(loss, self.scheme, self.mark, model)
            if balancing:
                self._balance(model, loss, norm, own)
                self._keep_step(ranks, batch[0])
        self._penalties += 1
        loss = self.balance.weight * (loss + self._rehearsed(model, own))
        if not self.soften:
            return loss
        return loss + self.soften * self.every * unlikeness(model, some[0], self.generator, self.method, now)

    def soft_labels(self, batch: Batch, smoothing: float = 0.1) -> Tensor:
        """Probabilities (b, C) to train the task on, in the place of smoothed labels: they carry the mark.

        ``batch``: inputs (b, *shape) as the model sees them, labels (b,). What ``smoothing`` takes from a
        label goes to the other classes as the key has it (:mod:`gradmark.embed.soft_labels`):
        ``loss = cross_entropy(model(x), marker.soft_labels((x, y))) + marker.penalty(model, (x, y))``.
        UsageError where the marker wasn't made with ``keyed_labels``.
        """
        if self.labels is None:
            raise UsageError("The marker has no keyed labels", fix="Marker(..., keyed_labels='beside')")
        return self.labels(batch, smoothing)

    def status(self) -> MarkStatus:
        """Bits matched and the p-value expected of a verification, from recent training carriers."""
        result, n = self.evidence.result(self.test), len(self.mark.bits)
        match, now = result.n_match / max(result.n, 1), self.balance
        return MarkStatus(n, match, result.log10_p, now.weight, now.push, self.method)

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to go on exactly as it would have."""
        return {
            **(self._running() | {"whose": self.evidence.whose}),
            "generator": self.generator.get_state(),
            "numbers": [self._steps, self._penalties, *vars(self.balance).values()],
            "method": self.method,
            "recomputes": self._recomputes,
            **{n: m and m.state_dict() for n, m in (("head", self.head), ("rehearsal", self.rehearsal))},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.evidence.load(state)
        if self.head is not None:
            self._through_head.load(state, "-head")
            self.head.load_state_dict(state["head"])
        if self.rehearsal is not None:
            self.rehearsal.load_state_dict(state["rehearsal"])
        self.generator.set_state(state["generator"])
        self._steps, self._penalties = int(state["numbers"][0]), int(state["numbers"][1])
        self.balance = Balance(*state["numbers"][2:])
        self.method, self._recomputes = state["method"], bool(state.get("recomputes", False))

    def _running(self) -> dict[str, Tensor]:
        return self.evidence.state() | ({} if self.head is None else self._through_head.state("-head"))

    def _labelled(self) -> tuple[int, ...]:
        return self.labels.parts if self.labels else ()

    def _due(self, every: bool, told: Batch | None = None) -> list[int]:
        """Numbers of the mark's parts to probe now; those that read the scores ``told`` cost nothing."""
        parts = sorted(set(range(len(self.parts))) - set(self._labelled()))
        if every or not self.ease:
            return parts
        free = () if told is None else from_scores(self.scheme)
        awake = [float(part.mean()) > _PLACED for part in self._short(self.evidence).split(self.parts)]
        return [i for i in parts if i in free or awake[i] or (self._penalties + i) % _REST == 0]

    def _rehearsed(self, model: nn.Module, own: Batch) -> Tensor:
        """The penalty of what a thief made of the model, where he is to be asked."""
        if not self.rehearsal or not (thief := self.rehearsal.step(model, own, self._begun())):
            return torch.zeros((), device=own[0].device)
        everything = list(range(len(self.parts)))
        with penalty_mode(thief.model, self.method), lasting():
            return thief.carried(self._pull(thief.model, own, everything, self.rehearsal.evidence), model)

    def _begun(self) -> bool:
        """Whether most margins are met in the model's own last layer: others may claim some of the push."""
        short = self.evidence.short(self.margin)[answered(self.scheme, self.parts)]
        return len(short) > 0 and float(short.mean()) < _FIRST

    def _short(self, seen: Evidence) -> Tensor:
        """By what share (n,) of its own margin each bit's running reading falls short."""
        if self.rehearsal and seen is self.rehearsal.evidence:
            return seen.short(self.margin)
        both = self.head is not None and self.head.settled and bool(self._through_head.seen.any())
        return self.evidence.short(self.margin, self._through_head if both else None)

    @contextmanager
    def _asking(self, model: nn.Module, own: Batch, balancing: bool) -> Iterator[Evidence]:
        """The model as the penalty asks it, and what takes in the answers."""
        instead = None
        if self.head is not None and self._begun():
            instead = self.head.through(model, own)
        if instead is None or balancing:
            yield self.evidence
            return
        with instead:
            yield self._through_head

    def _one_by_one(self, model: nn.Module, some: Batch, due: list[int], seen: Evidence) -> Iterator[Tensor]:
        """The terms of the penalty, each with a graph of its own."""
        yield from (self._pull(model, some, [i], seen) for i in due)
        if isinstance(self.scheme, Discreet):
            yield self.scheme.distortion(self.mark, model)

    def _pull(
        self, model: nn.Module, some: Batch, due: list[int], seen: Evidence, told: Batch | None = None
    ) -> Tensor:
        """How far the readings of these parts are from their margins: the penalty before its weight."""
        given: dict[str, Any] = {} if len(due) == len(self.parts) else {"only": due}
        if told is not None and from_scores(self.scheme):
            given["told"] = told
        signed, index = self.scheme.probe(self.mark, model, some, self.generator, self.method, **given)
        if not bool(torch.isfinite(signed).all()):
            raise ModelError(
                "The model's answers to the penalty's probes are not finite: training has diverged",
                fix="lower the learning rate or the strength",
            )
        seen.watch(signed.detach(), index)
        expected = seen.natural()  # what an unmarked network reads as well is no merit of the mark
        signed = signed - F.pad(expected, (0, 1)).to(signed)[index.clamp_max(len(expected))]
        # A bit pushes while its mean reading falls short of the margin, and each input while it
        # stays below a few margins: the mean is reached with the least disturbance.
        short = self._short(seen)
        gate = short[index.cpu() % len(short)].to(signed)
        limit = self.evidence.limits[index.cpu() % len(short)].to(signed)
        loss = (gate * F.relu(limit - signed / (_HEADROOM * self.margin))).mean()
        return loss if len(due) == len(self.parts) else loss * (len(due) / len(self.parts))

    def _balance(self, model: nn.Module, loss: Tensor, norm: float | None, batch: Batch) -> None:
        """Set the weight from both gradient norms and relax or renew the push. ``norm``: loss's, if known."""
        if self.fixed_weight is not None:
            self.balance.weight = self.fixed_weight
            return
        of_task, norm = norms(model, self.task_loss, loss, norm, batch)
        reached = self.status().log10_p <= self.target_log10_p if self._penalties else None
        self.balance.update(of_task, norm, self.strength * self.every, reached)

    def _keep_step(self, ranks: Ranks, like: Tensor) -> None:
        """Processes compute the same, but unlike devices round differently: now and then 0's word counts."""
        if ranks.size > 1:
            state = self.state_dict()
            self.load_state_dict({**state, **ranks.agreed(self._running(), state["numbers"], like)})
