"""The only judge: from a reading to a verdict, by the test that the mark file fixed beforehand.

Under the null hypothesis the suspect was made without the key. The key's bits are uniform and
independent of everything the readings depend on, so the signs of ``readings * bits`` are fair
coins whatever the suspect is, and the tests in :mod:`gradmark.stats` are exact.
"""

from __future__ import annotations

import math
import time
from dataclasses import replace

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
) -> Verdict:
    """Say whether ``suspect`` carries ``key``'s mark.

    ``pool``: natural inputs (b, *shape) and labels (b,) that the suspect wasn't trained on; the key
    picks the carriers among them. ``access``: by default white-box where the suspect allows it.
    ``queries``: the budget of single inputs for black-box access, of pairs where an API takes pairs.
    ``keys_tried``: how many keys or models were tried in this search; p is multiplied by it.

    Raises MismatchError if key and mark don't belong together or the suspect or the data don't fit,
    ModelError or EndpointError where the suspect fails.
    """
    start = time.perf_counter()
    mark.check_key(key)
    scheme = catalog.scheme(mark.scheme, mark.scheme_parameters)
    access = _access(access, suspect)
    _check(alpha, queries, access, keys_tried)
    secret = scheme.mark(key, mark.spec)
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
    return judge(
        reading, mark.test, scheme=mark.scheme, mark=mark.digest, suspect=suspect.digest,
        alpha=alpha, keys_tried=keys_tried, seconds=time.perf_counter() - start,
    )  # fmt: skip


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
