"""What a claim says: owner, mark with its commitment, model, the rule of the test, and when.

The payload is an in-toto statement (version 1) in canonical JSON. It has no field for inputs, probes,
labels, directions or bits: all of them follow from the key, and a judge derives them himself.
"""

from __future__ import annotations

import math
import re
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any

from gradmark import catalog
from gradmark._version import __version__
from gradmark.claim.search import TRIES, combined, searchable
from gradmark.codec import MarkFile
from gradmark.errors import ClaimError, MarkFileError, UsageError
from gradmark.files import canonical_json, parse_object
from gradmark.keys import OwnerKey, clean_owner
from gradmark.stats import fisher

STATEMENT = "https://in-toto.io/Statement/v1"
PREDICATE = "urn:gradmark:claim:1"
MAX_PAYLOAD = 2 << 20
ALPHA = 1e-25
"""The greatest threshold of a claim: 2**60 tries at it succeed with a chance of 1.2e-7."""
QUERIES = 2000
_SHA = re.compile(r"sha256:[0-9a-f]{64}")
_TIME = "%Y-%m-%dT%H:%M:%SZ"


@dataclass(frozen=True)
class ModelFile:
    """The marked model as the owner has it: its file's name, for people, and the SHA-256 of its bytes."""

    name: str
    digest: str


@dataclass(frozen=True)
class FixedPool:
    """The inputs that a suspect is to be read with; see :func:`gradmark.claim.pool.pool_digest`."""

    name: str
    digest: str
    inputs: int


@dataclass(frozen=True)
class Rule:
    """How a suspect is judged, besides what the mark fixes (scheme, parameters, spec, test, carriers).

    ``alpha``: the p-value at which the mark counts as found, at most :data:`ALPHA`. ``queries``: inputs
    sent to a suspect that can only be asked. ``pool``: None leaves the inputs to the judge.
    """

    alpha: float = ALPHA
    queries: int = QUERIES
    pool: FixedPool | None = None


@dataclass(frozen=True)
class Claim:
    """A claim's content. Every construction is checked: ClaimError on what makes no sense.

    ``made``: the owner's own clock, UTC to the second; only a time stamp makes it evidence.
    """

    owner: str
    key_id: str
    mark: MarkFile
    rule: Rule
    model: ModelFile | None
    made: str
    version: str = __version__

    def __post_init__(self) -> None:
        rule, pool, model = self.rule, self.rule.pool, self.model
        _require(_is_owner(self.owner), "owner", self.owner)
        _require(_is_sha(self.key_id), "key_id", self.key_id)
        _require(_is_time(self.made), "made", self.made)
        _require(_is_name(self.version), "version", self.version)
        _require(_is_number(rule.alpha) and 0 < rule.alpha < 1, "alpha", rule.alpha)
        _require(_is_count(rule.queries, 2, 10**9), "queries", rule.queries)
        for what, named in (("model", model), ("pool", pool)):
            _require(named is None or (_is_name(named.name) and _is_sha(named.digest)), what, named)
        _require(pool is None or _is_count(pool.inputs, 1, 10**12), "pool", pool)

    @classmethod
    def create(
        cls, key: OwnerKey, mark: MarkFile, *, model: ModelFile | None = None, pool: FixedPool | None = None,
        alpha: float = ALPHA, queries: int = QUERIES, made: datetime | None = None,
    ) -> Claim:  # fmt: skip
        """The claim of ``key``'s owner to ``mark``.

        Raises MismatchError where they don't belong together, UsageError where ``alpha`` is above
        :data:`ALPHA` or out of the mark's reach.
        """
        mark.check_key(key)
        least = least_alpha(key, mark)
        if not 0 < alpha <= ALPHA or least > math.log10(alpha):
            raise UsageError(
                "No claim can rest on that",
                expected=f"alpha of at most {ALPHA:g}, and a mark that can reach it",
                found=f"alpha={alpha:g}, and a mark whose p is never below 10^{least:.1f}",
                fix="embed a mark of more bits, or several under one key (the default scheme, as it is now)",
            )
        when = (made or datetime.now(UTC)).astimezone(UTC).strftime(_TIME)
        return cls(key.owner, key.key_id, mark, Rule(float(alpha), queries, pool), model, when)

    @property
    def subject(self) -> list[dict[str, Any]]:
        """What the statement is about, as in-toto has it: the mark's file, and the model's."""
        files = [("mark.json", self.mark.digest)]
        if self.model is not None:
            files.append((self.model.name, self.model.digest))
        return [
            {"name": name, "digest": {"sha256": digest.removeprefix("sha256:")}} for name, digest in files
        ]

    def to_payload(self) -> bytes:
        """The statement's bytes; ``docs/formats.md`` has every field."""
        mark = parse_object(self.mark.to_bytes(), what="mark", error=MarkFileError, limit=MAX_PAYLOAD)
        predicate = {
            "owner": self.owner, "key_id": self.key_id, "mark": mark, "rule": asdict(self.rule),
            "made": self.made, "version": self.version,
        }  # fmt: skip
        return canonical_json(
            {"_type": STATEMENT, "subject": self.subject, "predicateType": PREDICATE, "predicate": predicate}
        )

    @classmethod
    def from_payload(cls, data: bytes) -> Claim:
        """The claim in hostile ``data``; ClaimError if it isn't spelt just as :meth:`to_payload` does."""
        body = parse_object(data, what="claim's payload", error=ClaimError, limit=MAX_PAYLOAD)
        _fields(body, {"_type", "subject", "predicateType", "predicate"}, "statement")
        _require(body["_type"] == STATEMENT, "_type", body["_type"])
        _require(body["predicateType"] == PREDICATE, "predicateType", body["predicateType"])
        predicate = _fields(
            body["predicate"], {"owner", "key_id", "mark", "rule", "made", "version"}, "predicate"
        )
        rule = _fields(predicate["rule"], {"alpha", "queries", "pool"}, "rule")
        pool = rule["pool"]
        if pool is not None:
            pool = FixedPool(**_fields(pool, {"name", "digest", "inputs"}, "pool"))
        claim = cls(
            predicate["owner"], predicate["key_id"], _mark(predicate["mark"]),
            Rule(rule["alpha"], rule["queries"], pool), _model(body["subject"]), predicate["made"],
            predicate["version"],
        )  # fmt: skip
        if claim.to_payload() != data:
            raise ClaimError(
                "The claim's parts don't fit each other",
                expected="the digest of the mark it holds, and canonical JSON",
                found="other bytes than gradmark writes for this content",
                fix="Take an undamaged copy",
            )
        return claim


def least_alpha(key: OwnerKey, mark: MarkFile) -> float:
    """log10 of the least p that ``mark`` can give a judge: that of a perfect match in all of its bits."""
    secret = catalog.scheme(mark.scheme, mark.scheme_parameters).mark(key, mark.spec)
    least = [-n * math.log10(2) for n in getattr(secret, "sizes", (len(secret.bits),))]
    return combined(least) - TRIES if searchable(mark) else fisher(least)


def _mark(body: object) -> MarkFile:
    try:
        return MarkFile.from_bytes(canonical_json(body))
    except (MarkFileError, UsageError) as cause:
        raise ClaimError(
            "The claim's mark can't be read", expected=cause.expected, found=cause.found, fix=cause.fix
        ) from cause


def _model(subject: object) -> ModelFile | None:
    """The second subject; the first is the mark, whose digest the caller compares."""
    _require(isinstance(subject, list) and 1 <= len(subject) <= 2, "subject", subject)
    rows = [_fields(row, {"name", "digest"}, "subject") for row in subject]  # type: ignore[attr-defined]
    digests = [_fields(row["digest"], {"sha256"}, "digest")["sha256"] for row in rows]
    if len(rows) == 1:
        return None
    return ModelFile(rows[1]["name"], f"sha256:{digests[1]}")


def _fields(value: object, expected: set[str], what: str) -> dict[str, Any]:
    if not isinstance(value, dict) or set(value) != expected:
        raise ClaimError(
            f"The claim's {what} has other fields than it should",
            expected=", ".join(sorted(expected)),
            found=", ".join(sorted(value))[:200] if isinstance(value, dict) else type(value).__name__,
            fix="A claim has no place for anything else; take the file that gradmark wrote",
        )
    return value


def _require(good: bool, name: str, found: object) -> None:
    if not good:
        raise ClaimError(
            f"The claim's {name} makes no sense",
            expected="a value as gradmark writes it",
            found=repr(found)[:80],
            fix="Take an undamaged copy",
        )


def _is_owner(value: object) -> bool:
    try:
        return clean_owner(value) == value
    except UsageError:
        return False


def _is_name(value: object) -> bool:
    """A file's name or a version: short, printable, without folders."""
    return isinstance(value, str) and 1 <= len(value) <= 200 and value.isprintable() and "/" not in value


def _is_sha(value: object) -> bool:
    return isinstance(value, str) and bool(_SHA.fullmatch(value))


def _is_time(value: object) -> bool:
    try:
        return isinstance(value, str) and datetime.strptime(value, _TIME).strftime(_TIME) == value
    except ValueError:
        return False


def _is_number(value: object) -> bool:
    return isinstance(value, float)


def _is_count(value: object, low: int, high: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high
