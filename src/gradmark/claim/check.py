"""What can be wrong with a claim, looked at offline, one named check after the other."""

from __future__ import annotations

from dataclasses import dataclass, replace
from datetime import datetime
from typing import TYPE_CHECKING, Any

from gradmark.claim.file import ClaimFile
from gradmark.claim.statement import ALPHA
from gradmark.claim.timestamp import Stamp, read_stamp
from gradmark.codec import MarkFile
from gradmark.errors import MismatchError, TimestampError
from gradmark.keys import OwnerKey

if TYPE_CHECKING:
    from cryptography.x509 import Certificate


@dataclass(frozen=True)
class Check:
    """``ok``: True passed, False failed, None couldn't be looked at; ``found`` says it in a sentence."""

    name: str
    ok: bool | None
    found: str


@dataclass(frozen=True)
class Checked:
    """All checks of ``file``. ``attested``: the earliest time that a trusted stamp gives it, or None."""

    file: ClaimFile
    checks: tuple[Check, ...]
    stamps: tuple[Stamp, ...]
    attested: datetime | None

    @property
    def valid(self) -> bool:
        """No check failed. What couldn't be looked at doesn't count against it, and proves nothing."""
        return all(check.ok is not False for check in self.checks)

    def to_json(self) -> dict[str, Any]:
        claim, model = self.file.claim, self.file.claim.model
        return {
            "valid": self.valid,
            "owner": claim.owner,
            "signer": self.file.signer,
            "claim": self.file.digest,
            "mark": claim.mark.digest,
            "model": None if model is None else model.digest,
            "scheme": claim.mark.scheme,
            "alpha": claim.rule.alpha,
            "pool": None if claim.rule.pool is None else claim.rule.pool.digest,
            "made": claim.made,
            "attested": _iso(self.attested),
            "timestamps": [
                {"time": _iso(s.time), "authority": s.authority, "fits": s.fits, "trusted": s.trusted}
                for s in self.stamps
            ],
            "checks": [{"name": c.name, "ok": c.ok, "found": c.found} for c in self.checks],
        }


def check_claim(
    file: ClaimFile, *, mark: MarkFile | None = None, key: OwnerKey | None = None, model: str | None = None,
    trusted: list[Certificate] | None = None, against: ClaimFile | None = None,
) -> Checked:  # fmt: skip
    """Look at ``file`` itself, and at whatever of the rest is given.

    ``mark``: the public mark's file. ``key``: the owner's, or the one disclosed. ``model``: ``sha256:`` of
    the bytes of a model's file. ``trusted``: certificates of time stamp authorities. ``against``: another
    claim; this one fails unless it was stamped earlier. Raises UsageError where stamps can't be read for
    want of a package.
    """
    checks = [_signature(file), _threshold(file)]
    if mark is not None:
        same = mark.digest == file.claim.mark.digest
        checks.append(Check("mark", same, "It is of this mark file." if same else "It is of another mark."))
    if key is not None:
        checks.append(_key(file, key))
    if model is not None:
        checks.append(_model(file, model))
    stamps, found, attested = _stamps(file, trusted)
    checks += found
    if against is not None:
        checks.append(_against(attested, file, against, trusted))
    return Checked(file, tuple(checks), stamps, attested)


def _signature(file: ClaimFile) -> Check:
    good = file.envelope.verifies()
    found = (
        f"The claim is as its signer signed it, who says to be {file.claim.owner}: {file.signer}."
        if good
        else "The claim was changed after it was signed, or never signed by the key it names."
    )
    return Check("signature", good, found)


def _threshold(file: ClaimFile) -> Check:
    alpha = file.claim.rule.alpha
    if alpha <= ALPHA:
        return Check("threshold", True, f"It asks for p of at most {alpha:g}, out of a key search's reach.")
    found = f"It asks for p of at most {alpha:g}; above {ALPHA:g} a key that fits can be searched for."
    return Check("threshold", False, found)


def _key(file: ClaimFile, key: OwnerKey) -> Check:
    claim = file.claim
    try:
        claim.mark.check_key(key)
    except MismatchError:
        return Check("key", False, "The mark commits to another key, another owner or other settings.")
    same = file.signed_by(key) and claim.key_id == key.key_id and claim.owner == key.owner
    return Check(
        "key", same,
        "The commitment opens: owner, scheme and its settings are those that this key committed to."
        if same else "The claim was signed with another key than the one its mark commits to.",
    )  # fmt: skip


def _model(file: ClaimFile, digest: str) -> Check:
    named = file.claim.model
    if named is None:
        return Check("model", False, "The claim names no model.")
    same = named.digest == digest
    return Check("model", same, f"The file is {named.name} as claimed, byte for byte." if same
                 else f"The file isn't {named.name} as claimed: its bytes differ.")  # fmt: skip


def _stamps(
    file: ClaimFile, trusted: list[Certificate] | None
) -> tuple[tuple[Stamp, ...], list[Check], datetime | None]:
    if not file.stamps:
        found = f"There is no time stamp: that it was made on {file.claim.made} is the owner's word alone."
        return (), [Check("time", None, found)], None
    stamps, checks = [], []
    for data in file.stamps:
        try:
            stamp = read_stamp(data, file.stamped, trusted)
        except TimestampError as error:
            checks.append(Check("time", False, str(error)))
            continue
        stamps.append(stamp)
        checks.append(_stamp(stamp))
    good = [s.time for s in stamps if s.trusted and s.fits]
    if good:  # stamps lie outside of the signature: what anybody can add must not undo the one that holds
        checks = [check if check.ok else replace(check, ok=None) for check in checks]
    return tuple(stamps), checks, min(good, default=None)


def _stamp(stamp: Stamp) -> Check:
    said = f"{stamp.authority} says that this claim existed at {_iso(stamp.time)}"
    if not stamp.fits:
        return Check("time", False, f"The time stamp of {stamp.authority} is of something else.")
    if stamp.trusted is None:
        return Check("time", None, f"{said}; give --tsa-certificates to check that it was really them.")
    if not stamp.trusted:
        return Check("time", False, f"{said}, but no given certificate vouches for that ({stamp.reason}).")
    return Check("time", True, f"{said}, and a given certificate vouches for them.")


def _against(
    mine: datetime | None, file: ClaimFile, other: ClaimFile, trusted: list[Certificate] | None
) -> Check:
    rival = check_claim(other, trusted=trusted)
    name = other.claim.owner
    if other.digest == file.digest:
        return Check("earlier", False, "Both files are the same claim.")
    if mine is None:
        return Check("earlier", False, "Without a trusted time stamp this claim is earlier than no other.")
    if not rival.valid or rival.attested is None:
        return Check("earlier", True, f"The claim of {name} is invalid or has no trusted time stamp.")
    order = f"this claim is of {_iso(mine)}, that of {name} of {_iso(rival.attested)}"
    if mine < rival.attested:
        return Check("earlier", True, f"It is the earlier one: {order}.")
    return Check("earlier", False, f"It is not the earlier one: {order}.")


def _iso(time: datetime | None) -> str | None:
    return None if time is None else time.strftime("%Y-%m-%dT%H:%M:%SZ")
