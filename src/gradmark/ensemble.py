"""Several schemes under one key: an attack that takes one mark leaves the others.

Every part has bits of its own, so the parts' exact p-values are independent where the mark is
absent, and Fisher's combination of them is exact again (:func:`gradmark.stats.run_tests`). All bits hang on
the whole of the mark: who searches for a key or for parameters that fit somebody's model draws all of them
with every try, and can't put together parts that he found one by one.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from gradmark.codec import canonical_json
from gradmark.embed.discreet import Discreet
from gradmark.embed.heads import in_weights
from gradmark.embed.soft_labels import Tilting
from gradmark.errors import MismatchError, UsageError
from gradmark.keys import OwnerKey
from gradmark.protocols import Access, Batch, BlackBox, ModelSpec, Reading, Scheme
from gradmark.questions import Questions


@dataclass(frozen=True)
class EnsembleMark:
    """The marks of the parts; ``bits`` (n,) are theirs in a row."""

    spec: ModelSpec
    parts: tuple[Any, ...]
    shares: tuple[float, ...]

    @property
    def limits(self) -> Tensor:
        """(n,) the reading, in units of its part's margin, at which each bit counts as placed."""
        counts = torch.tensor(self.sizes)
        return torch.tensor(self.shares, dtype=torch.float64).repeat_interleave(counts)

    @property
    def bits(self) -> Tensor:
        return torch.cat([part.bits for part in self.parts])

    @property
    def sizes(self) -> tuple[int, ...]:
        """Bits of each part."""
        return tuple(len(part.bits) for part in self.parts)

    @property
    def reference(self) -> tuple[Tensor | None, ...]:
        """The parts' readings of an unmarked network."""
        return tuple(getattr(part, "reference", None) for part in self.parts)

    def order(self, n: int) -> Tensor:
        """Keyed order (n,) of a pool's inputs in the first part's readings."""
        found: Tensor = self.parts[0].order(n)
        return found


@dataclass(frozen=True)
class Ensemble:
    """``parts``: schemes of different names. Each reads on its own; an API's query budget is shared
    out equally, and what a part leaves goes to those before it. ``joint``: whether bits hang on the whole
    mark; those of marks made before there was a choice hang on their part alone."""

    parts: tuple[Scheme, ...]
    joint: bool = True

    name: ClassVar[str] = "ensemble"
    reads: ClassVar[str] = "gradients"
    margin: ClassVar[float] = 1.0
    """In units of the parts' own margins, of which a bit is taken to these shares:"""
    shares: ClassVar[dict[str, float]] = {"filter-gradient": 0.5, "class-contrast": 2.0, "trigger": 0.5}
    """Half for what makes blur and weak contrast harder to bear, twice for what harms nothing."""
    new_heads: ClassVar[bool] = True
    """A thief who trains the last layer anew keeps the mark (:mod:`gradmark.embed.heads`)."""
    target_log10_p: ClassVar[float] = -math.inf
    """Beyond any reach: a bit's push ends where its own margin is met, not where p is small enough."""

    def __post_init__(self) -> None:
        names = [part.name for part in self.parts]
        if not names or len(set(names)) < len(names) or self.name in names:
            raise UsageError("An ensemble needs schemes of different names", found=", ".join(names))

    @property
    def needs(self) -> Access:
        """Black-box access suffices where one part at least can be read through an API."""
        return "black" if self._readable("black") else "white"

    def parameters(self) -> dict[str, Any]:
        parts = [{"scheme": p.name, "parameters": p.parameters()} for p in self.parts]
        return {"parts": parts, "joint": True} if self.joint else {"parts": parts}

    def calibrated(self, key: OwnerKey, spec: ModelSpec, unmarked: BlackBox, pool: Batch) -> Ensemble:
        """Every part that wants it with ``unmarked``'s readings taken away from its own."""
        parts = (
            part.calibrated(key, spec, unmarked, pool) if hasattr(part, "calibrated") else part
            for part in self.parts
        )
        return replace(self, parts=tuple(parts))

    def fitting(self, spec: ModelSpec) -> Ensemble:
        """Without the parts that have no room in such a model (``fits``); UsageError if none is left."""
        return replace(self, parts=tuple(p for p in self.parts if getattr(p, "fits", _always)(spec)))

    def mark(self, key: OwnerKey, spec: ModelSpec) -> EnsembleMark:
        """The parts' secrets; ``joint`` bits are the parts' own times signs that the whole mark draws."""
        shares = tuple(self.shares.get(part.name, 1.0) for part in self.parts)
        alone = EnsembleMark(spec, tuple(part.mark(key, spec) for part in self.parts), shares)
        if not self.joint:
            return alone
        whole = {"scheme": self.name, "parameters": self.parameters(), "spec": spec.to_json()}
        signs = torch.from_numpy(
            key.uniform_bits("joint bits", sum(alone.sizes), context=canonical_json(whole))
        ).split(alone.sizes)
        parts = [replace(p, bits=p.bits * s.to(p.bits)) for p, s in zip(alone.parts, signs, strict=True)]
        return replace(alone, parts=tuple(parts))

    def probe(
        self,
        mark: EnsembleMark,
        model: nn.Module,
        batch: Batch,
        generator: torch.Generator,
        method: Any,
        only: Collection[int] | None = None,
        told: Batch | None = None,
    ) -> tuple[Tensor, Tensor]:
        """All parts' readings (m, 1), each in units of its own margin, and the bits' numbers (m, 1).

        ``only``: numbers of the parts to probe, one at least; by default all of them. ``told``: scores
        and labels of natural inputs, for the parts that read no more than these.
        """
        values, numbers, asked, pushes, total = [], [], [], [], sum(mark.sizes)
        starts = [sum(mark.sizes[:i]) for i in range(len(self.parts))]
        for i, (scheme, part, first) in enumerate(zip(self.parts, mark.parts, starts, strict=True)):
            if only is not None and i not in only:
                continue
            given = {"told": told} if told is not None and hasattr(scheme, "signed") else {}
            signed, index = scheme.probe(part, model, batch, generator, method, **given)
            real = index < len(part.bits)
            numbers.append(torch.where(real, index + first, total).reshape(-1, 1).to(signed.device))
            values.append(signed.reshape(-1, 1) / getattr(scheme, "margin", 1.0))
            asked.append(not in_weights(scheme))
            pushes.append(int(getattr(scheme, "push", 1)))
        # Parts weigh the same in the penalty's mean, or as much as they say, however many numbers each of
        # them reads. Bits in the weights take turns, since repeated answers would look like several to who
        # keeps their means.
        answers = [len(v) for v, a in zip(values, asked, strict=True) if a]
        most = max(answers, default=0) or max(len(v) for v in values)
        for i, v in enumerate(values):
            if len(v) > most:
                some = torch.randperm(len(v), generator=generator)[:most]
                values[i], numbers[i] = v[some.to(v.device)], numbers[i][some.to(v.device)]
        often = [push * (most // max(1, len(v))) for v, push in zip(values, pushes, strict=True)]
        return (
            torch.cat([v.repeat(n, 1) for v, n in zip(values, often, strict=True)]),
            torch.cat([v.repeat(n, 1) for v, n in zip(numbers, often, strict=True)]),
        )

    def distortion(self, mark: EnsembleMark, model: nn.Module) -> Tensor:
        """The sum of the parts' own."""
        found = [
            scheme.distortion(part, model)
            for scheme, part in zip(self.parts, mark.parts, strict=True)
            if isinstance(scheme, Discreet)
        ]
        return torch.stack(found).sum() if found else torch.zeros(())

    def tilt(self, mark: EnsembleMark, x: Tensor, labels: Tensor, margin: float) -> Tensor:
        """The sum (b, C) of those of the parts that have one; ``margin`` in units of their own."""
        rows = zip(self.parts, mark.parts, mark.shares, strict=True)
        found = [
            scheme.tilt(part, x, labels, margin * share * getattr(scheme, "margin", 1.0))
            for scheme, part, share in rows
            if isinstance(scheme, Tilting)
        ]
        return torch.stack(found).sum(0)

    def read(
        self,
        mark: EnsembleMark,
        suspect: Any,
        pool: Batch,
        *,
        access: Access,
        carriers: int,
        queries: int = 0,
    ) -> Reading:
        """The parts' readings in a row. A part that can't be read this way reads zeros: no evidence. So does
        one that lies in weights which the suspect hasn't got, such as a student of another architecture.

        The last part asks first: what it has no use for, a few triggers say, is left to those before it.
        """
        able = self._readable(access)
        found: list[Reading] = []
        left, waiting = queries, len(able)
        for scheme, part in reversed(list(zip(self.parts, mark.parts, strict=True))):
            if scheme in able:
                asked = {"access": access, "carriers": carriers, "queries": left // waiting}
                try:
                    found.append(scheme.read(part, suspect, pool, **asked))
                except MismatchError:
                    if not in_weights(scheme) or len(self.parts) == 1:
                        raise
                    found.append(_nothing(part, access))
                left, waiting = left - found[-1].queries, waiting - 1
            else:
                found.append(_nothing(part, access))
        found.reverse()
        return Reading(
            torch.cat([r.values for r in found]),
            torch.cat([r.bits for r in found]),
            max(r.carriers for r in found),
            sum(r.queries for r in found),
            access,
            _history([r for r in found if r.queries], found),
            mark.sizes,
        )

    def questions(self, mark: EnsembleMark, pool: Batch, carriers: int) -> tuple[Questions, ...]:
        """Those of every part that has some, in a row."""
        found: list[Questions] = []
        for scheme, part in zip(self.parts, mark.parts, strict=True):
            if hasattr(scheme, "questions"):
                found += scheme.questions(part, pool, carriers)
        return tuple(found)

    def _readable(self, access: Access) -> tuple[Scheme, ...]:
        return tuple(p for p in self.parts if access == "white" or getattr(p, "needs", "black") == "black")


def _nothing(part: Any, access: Access) -> Reading:
    return Reading(torch.zeros(len(part.bits), dtype=torch.float64), part.bits.double(), 0, 0, access)


def _always(spec: ModelSpec) -> bool:
    return True


def _history(asked: list[Reading], found: list[Reading]) -> tuple[tuple[int, Tensor], ...]:
    """The parts' histories side by side: what was read after equal shares of the queries."""
    points = min((len(r.history) for r in asked), default=0)
    rows = []
    for back in range(points, 0, -1):
        at = {id(r): r.history[-back] for r in asked}
        values = [at[id(r)][1] if id(r) in at else r.values for r in found]
        rows.append((sum(n for n, _ in at.values()), torch.cat(values)))
    return tuple(rows)
