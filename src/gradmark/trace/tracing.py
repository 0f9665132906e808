"""Which licensee's copy is this? One reading, every licensee's exact p, and what follows from it."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from gradmark._version import __version__
from gradmark.codec import MarkFile
from gradmark.errors import UsageError
from gradmark.keys import OwnerKey
from gradmark.protocols import Access, Batch, BlackBox, Reading, TestName, Verdict, WhiteBox
from gradmark.stats import least_log10_p
from gradmark.trace.codebook import Told
from gradmark.trace.licensees import checked
from gradmark.trace.marks import open_tracing
from gradmark.trace.ranking import Found, rank
from gradmark.verify import DEFAULT_ALPHA, DEFAULT_QUERIES, verify

TraceOutcome = Literal["named", "no-evidence", "inconclusive"]


@dataclass(frozen=True)
class Named:
    """A licensee, number ``index`` (from 0) on the list, whose copy is in the suspect.

    ``log10_p`` is corrected for all licensees and rounds; ``match``: part of the usable bits that agree.
    """

    licensee: str
    log10_p: float
    match: float
    round: int
    index: int


@dataclass(frozen=True)
class Trace:
    """The answer; ``to_json`` is the public interface of ``gradmark trace --json``.

    ``log10_p``: the least of all licensees' corrected p in the first round. ``owned``: what verification of
    the base mark says; asked only where nobody is named. ``ranking`` (m,): corrected log10 p in the order
    of the list, first round; not in the JSON, and no innocent's name is.
    """

    outcome: TraceOutcome
    named: tuple[Named, ...]
    log10_p: float
    alpha: float
    licensees: int
    keys_tried: int
    test: TestName
    n_bits: int
    ties: int
    carriers: int
    queries: int
    queries_allowed: int
    access: Access
    mark: str
    trace: str
    suspect: str
    seconds: dict[str, float]
    version: str
    reason: str
    owned: Verdict | None = None
    ranking: NDArray[np.float64] = field(default_factory=lambda: np.zeros(0), compare=False, repr=False)

    def to_json(self) -> dict[str, Any]:
        """JSON values, without the ranking."""
        found = {name: getattr(self, name) for name in self.__dataclass_fields__ if name != "ranking"}
        owned = None if self.owned is None else self.owned.to_json()
        return found | {"named": [vars(one) for one in self.named], "owned": owned}


def trace(
    mark: MarkFile,
    base: MarkFile,
    key: OwnerKey,
    suspect: WhiteBox | BlackBox,
    pool: Batch,
    licensees: Sequence[str],
    *,
    access: Access | None = None,
    alpha: float = DEFAULT_ALPHA,
    queries: int = DEFAULT_QUERIES,
    keys_tried: int = 1,
    told: Told = lambda *_: None,
) -> Trace:
    """Name the licensees whose copies are in ``suspect``, or say that none can be.

    ``mark``: the tracing mark (``trace.json``); ``base``: the mark of the model that copies were made from.
    ``pool``: natural inputs (b, *shape) and labels (b,) that the suspect wasn't trained on. ``queries``:
    the budget of single inputs for black-box access; half of it is kept for the base mark, which is
    asked about where nobody is named. ``alpha``: the chance, at most, that any innocent is named.

    Raises MismatchError, MarkFileError, DataError, ModelError, EndpointError, UsageError.
    """
    names = checked(licensees)
    tracing = open_tracing(mark, key, base)
    access = access or ("white" if isinstance(suspect, WhiteBox) else "black")
    if not 0 < alpha < 1 or keys_tried < 1 or (access == "black" and queries < 8):
        raise UsageError(
            "The settings of the trace make no sense",
            expected="0 < alpha < 1, keys_tried >= 1, at least 8 queries",
            found=f"alpha={alpha}, keys_tried={keys_tried}, queries={queries}",
        )
    watch = _Watch()
    with torch.random.fork_rng(devices=[]):
        reading = tracing.probes.read(
            tracing.mark, suspect, pool, access=access, carriers=mark.carriers, queries=queries // 2
        )
    watch.lap("reading")
    signs = tracing.codebook.table(names, told)
    watch.lap("codebook")
    values = reading.values.numpy()
    ranking = rank(values, signs, test=mark.test, alpha=alpha, parts=reading.parts, tried=keys_tried)
    watch.lap("ranking")
    owned = None
    if not ranking.found:
        owned = verify(
            base, key, suspect, pool, access=access, alpha=alpha, queries=queries - queries // 2,
            keys_tried=keys_tried,
        )  # fmt: skip
        watch.lap("base mark")
    outcome, reason = _outcome(reading, ranking.found, owned, alpha, len(names) * keys_tried)
    return Trace(
        outcome=outcome,
        named=tuple(Named(names[f.index], f.log10_p, f.match, f.round, f.index) for f in ranking.found),
        log10_p=float(ranking.log10_p.min()),
        alpha=alpha,
        licensees=len(names),
        keys_tried=keys_tried,
        test=mark.test,
        n_bits=len(values),
        ties=int((values == 0).sum()),
        carriers=reading.carriers,
        queries=reading.queries + (owned.queries if owned is not None else 0),
        queries_allowed=queries if access == "black" else 0,
        access=access,
        mark=base.digest,
        trace=mark.digest,
        suspect=suspect.digest,
        seconds=watch.laps,
        version=__version__,
        reason=reason,
        owned=owned,
        ranking=ranking.log10_p,
    )


def _outcome(
    reading: Reading, found: tuple[Found, ...], owned: Verdict | None, alpha: float, tried: int
) -> tuple[TraceOutcome, str]:
    """What follows, and why in a sentence."""
    if found:
        n = len(found)
        return "named", f"{n} licensee{'s reach' if n > 1 else ' reaches'} the threshold"
    best = least_log10_p(reading.values.numpy(), reading.parts) + math.log10(2 * tried)
    if best > math.log10(alpha):
        usable = int(reading.values.count_nonzero())
        return "inconclusive", f"only {usable} bits gave a usable reading: too few for {tried} licensees"
    if owned is not None and owned.outcome == "owned":
        return "inconclusive", (
            "the model carries the base mark, but no licensee on the list reaches the threshold: it is the "
            "base itself, a copy for somebody who isn't listed, one that was changed much, or a mixture of "
            "many"
        )
    return "no-evidence", "no licensee on the list reaches the threshold, and the base mark isn't found"


class _Watch:
    """Seconds between laps."""

    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.laps[name], self._last = round(now - self._last, 3), now
