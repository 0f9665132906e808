"""The only judge: from a reading to a verdict, by the test that the mark file fixed beforehand.

Under the null hypothesis the suspect was made without the key. The key's bits are uniform and
independent of everything the readings depend on, so the signs of ``readings * bits`` are fair
coins whatever the suspect is, and the tests in :mod:`gradmark.stats` are exact.
"""

from __future__ import annotations

import math
import time
from dataclasses import replace
from typing import Any

import torch

from gradmark import catalog
from gradmark._version import __version__
from gradmark.codec import MarkFile
from gradmark.errors import UsageError
from gradmark.keys import OwnerKey
from gradmark.protocols import (
    Access,
    Batch,
    BlackBox,
    ModelSpec,
    Outcome,
    Reading,
    TestName,
    Verdict,
    WhiteBox,
)
from gradmark.schemes.linear import LinearMark
from gradmark.scores import check_pool, check_range
from gradmark.sequential import Run, Sequential
from gradmark.stats import bonferroni, least_log10_p, run_tests

DEFAULT_ALPHA = 1e-6
DEFAULT_QUERIES = 2000


def verify(
    mark: MarkFile,
    key: OwnerKey,
    suspect: WhiteBox | BlackBox,
    pool: Batch,
    *,
    access: Access | None = None,
    alpha: float = DEFAULT_ALPHA,
    queries: int = DEFAULT_QUERIES,
    keys_tried: int = 1,
    sequential: bool = False,
) -> Verdict:
    """Say whether ``suspect`` carries ``key``'s mark.

    ``pool``: natural inputs (b, *shape) and labels (b,) that the suspect wasn't trained on; the key
    picks the carriers among them. ``access``: by default white-box where the suspect allows it.
    ``queries``: the budget of single inputs for black-box access, of pairs where an API takes pairs.
    ``keys_tried``: how many keys or models were tried in this search; p is multiplied by it.
    ``sequential``: ask a black box step by step and stop as soon as the evidence suffices
    (:mod:`gradmark.sequential`); ``queries`` is the most.

    Raises MismatchError if key and mark don't belong together or the suspect or the data don't fit,
    ModelError or EndpointError where the suspect fails.
    """
    start = time.perf_counter()
    mark.check_key(key)
    scheme = catalog.scheme(mark.scheme, mark.scheme_parameters)
    access = _access(access, suspect)
    _check(alpha, queries, access, keys_tried)
    check_pool(mark.spec, pool)  # first of all: a hostile mark's secrets may be larger than any memory
    check_range(mark.spec, pool[0])
    secret = scheme.mark(key, mark.spec)
    if sequential:
        return _step_by_step(
            mark, scheme, secret, suspect, pool, access=access, alpha=alpha, queries=queries,
            keys_tried=keys_tried, start=start,
        )  # fmt: skip
    price, entry = getattr(suspect, "price", 1), getattr(suspect, "entry", 0)
    with torch.random.fork_rng(devices=[]):
        reading = scheme.read(
            secret,
            suspect,
            pool,
            access=access,
            carriers=mark.carriers,
            queries=max(0, (queries - entry) // price),
        )
    if access == "black":
        reading = _priced(reading, price, entry)
    found = judge(
        reading, mark.test, scheme=mark.scheme, mark=mark.digest, suspect=suspect.digest,
        alpha=alpha, keys_tried=keys_tried, seconds=time.perf_counter() - start,
    )  # fmt: skip
    return replace(found, queries_allowed=queries if access == "black" else 0)


def _step_by_step(
    mark: MarkFile, scheme: Any, secret: Any, suspect: BlackBox, pool: Batch, *, access: Access,
    alpha: float, queries: int, keys_tried: int, start: float,
) -> Verdict:  # fmt: skip
    if access != "black":
        raise UsageError("Only a black box is read step by step", fix="ask for --access black")
    if not hasattr(scheme, "questions"):
        raise UsageError(f"The scheme {mark.scheme} can't be read step by step", fix="leave --sequential out")
    price, entry = getattr(suspect, "price", 1), getattr(suspect, "entry", 0)
    parts = scheme.questions(secret, pool, mark.carriers)
    if not parts:
        raise UsageError("No part of the mark can be read step by step", fix="leave --sequential out")
    with torch.random.fork_rng(devices=[]):
        run = Sequential(suspect, parts, mark.spec.n_classes).run(
            math.log10(keys_tried) - math.log10(alpha), max(0, (queries - entry) // price)
        )
    paid = tuple((price * n + entry, won) for n, won in run.evidence)
    run = replace(run, queries=price * run.queries + entry, evidence=paid)
    bits = torch.cat([part.bits.double() for part in parts])
    reading = Reading(run.values, bits, run.observations, run.queries, "black")
    found = judge_bets(
        run, reading, scheme=mark.scheme, mark=mark.digest, suspect=suspect.digest, alpha=alpha,
        keys_tried=keys_tried, seconds=time.perf_counter() - start,
    )  # fmt: skip
    return replace(found, queries_allowed=queries)


def verify_linear(
    mark: LinearMark,
    suspect: WhiteBox | BlackBox,
    pool: Batch,
    spec: ModelSpec,
    *,
    access: Access | None = None,
    alpha: float = DEFAULT_ALPHA,
    queries: int = DEFAULT_QUERIES,
    keys_tried: int = 1,
) -> Verdict:
    """:func:`verify` for a mark made elsewhere: valid only if it was fixed before the suspect existed."""
    start = time.perf_counter()
    access = _access(access, suspect)
    _check(alpha, queries, access, keys_tried)
    reading = mark.read(suspect, pool, spec, access=access, queries=queries)
    return judge(
        reading, "sign", scheme=mark.name, mark=mark.digest, suspect=suspect.digest,
        alpha=alpha, keys_tried=keys_tried, seconds=time.perf_counter() - start,
    )  # fmt: skip


def judge(
    reading: Reading,
    test: TestName,
    *,
    scheme: str,
    mark: str,
    suspect: str,
    alpha: float,
    keys_tried: int,
    seconds: float,
) -> Verdict:
    """Apply the fixed test. ``inconclusive`` if even a perfect match couldn't reach ``alpha``."""
    signed = (reading.values * reading.bits).numpy()
    result = run_tests(test, signed, reading.parts)
    log10_p = bonferroni(result.log10_p, keys_tried)
    best = least_log10_p(signed, reading.parts) + math.log10(keys_tried)
    outcome: Outcome = "no-evidence"
    reason = f"log10 p is {log10_p:.1f}; the threshold is {math.log10(alpha):.1f}"
    if best > math.log10(alpha):
        outcome = "inconclusive"
        reason = f"only {result.n} of {len(reading.bits)} bits gave a usable reading: too few to reach alpha"
    elif log10_p <= math.log10(alpha):
        outcome = "owned"
    return Verdict(
        outcome=outcome,
        log10_p=log10_p,
        alpha=alpha,
        test=test,
        n_bits=len(reading.bits),
        n_match=result.n_match,
        ties=result.ties,
        match=result.n_match / max(result.n, 1),
        carriers=reading.carriers,
        queries=reading.queries,
        access=reading.access,
        scheme=scheme,
        mark=mark,
        suspect=suspect,
        keys_tried=keys_tried,
        seconds=round(seconds, 3),
        version=__version__,
        reason=reason,
        reading=reading,
    )


def _priced(reading: Reading, price: int, entry: int) -> Reading:
    """``reading`` with its queries counted as the API counts them (:class:`gradmark.views.Asked`)."""
    paid = tuple((price * n + entry, values) for n, values in reading.history)
    return replace(reading, queries=price * reading.queries + entry, history=paid)


def judge_bets(
    run: Run, reading: Reading, *, scheme: str, mark: str, suspect: str, alpha: float, keys_tried: int,
    seconds: float,
) -> Verdict:  # fmt: skip
    """By Ville's inequality p is 1 / e, e being the most that the bets ever won."""
    log10_p = bonferroni(-max(run.log10_best, 0.0), keys_tried)
    agreed = int((reading.values * reading.bits > 0).sum())
    outcome: Outcome = "no-evidence"
    asked = math.log10(keys_tried) - math.log10(alpha)
    reason = f"log10 e is {run.log10_e:.1f} after {run.queries} queries; the threshold is {asked:.1f}"
    if log10_p <= math.log10(alpha):
        outcome = "owned"
    elif run.usable * math.log10(2) < asked:
        outcome = "inconclusive"
        reason = f"only {run.usable} of {len(reading.bits)} bits could be bet on: too few to reach alpha"
    return Verdict(
        outcome=outcome, log10_p=log10_p, alpha=alpha, test="betting", n_bits=len(reading.bits),
        n_match=agreed, ties=len(reading.bits) - run.usable, match=agreed / max(run.usable, 1),
        carriers=reading.carriers, queries=reading.queries, access=reading.access, scheme=scheme, mark=mark,
        suspect=suspect, keys_tried=keys_tried, seconds=round(seconds, 3), version=__version__,
        reason=reason, log10_e=run.log10_e, evidence=run.evidence, reading=reading,
    )  # fmt: skip


def _access(access: Access | None, suspect: WhiteBox | BlackBox) -> Access:
    if access is not None:
        return access
    return "white" if isinstance(suspect, WhiteBox) else "black"


def _check(alpha: float, queries: int, access: Access, keys_tried: int) -> None:
    if not 0 < alpha < 1 or keys_tried < 1 or (access == "black" and queries < 2):
        raise UsageError(
            "The verification's settings make no sense",
            expected="0 < alpha < 1, keys_tried >= 1, at least 2 queries",
            found=f"alpha={alpha}, keys_tried={keys_tried}, queries={queries}",
        )
