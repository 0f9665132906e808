"""The claim's file: a DSSE envelope that also holds its time stamps.

The stamps are of the envelope without them, so that any number can be added, and a reader of plain
DSSE, who has to ignore what he doesn't know, can check the signature.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from typing import Any

from gradmark.claim.statement import MAX_PAYLOAD, Claim
from gradmark.dsse import Envelope, from_base64, public_bytes, to_base64
from gradmark.errors import ClaimError
from gradmark.files import atomic_write, canonical_json, parse_object, read_limited, sha256
from gradmark.keys import OwnerKey

PURPOSE = "claim-signature"
PAYLOAD_TYPE = "application/vnd.in-toto+json"
MAX_CLAIM = 4 << 20
MAX_STAMPS = 16


@dataclass(frozen=True)
class ClaimFile:
    """A signed claim. ``stamps``: RFC 3161 time stamp responses (DER) over :attr:`stamped`."""

    claim: Claim
    envelope: Envelope
    stamps: tuple[bytes, ...] = ()

    @classmethod
    def sign(cls, key: OwnerKey, claim: Claim) -> ClaimFile:
        """``claim`` under the Ed25519 key that belongs to ``key``."""
        return cls(claim, Envelope.sign(key, PURPOSE, PAYLOAD_TYPE, claim.to_payload()))

    @property
    def stamped(self) -> bytes:
        """The bytes that a time stamp is of: the envelope alone, in canonical JSON."""
        return self.envelope.to_bytes()

    @property
    def digest(self) -> str:
        """``sha256:`` of :attr:`stamped`; the claim's name, whatever stamps are added later."""
        return sha256(self.stamped)

    @property
    def signer(self) -> str:
        """``ed25519:`` and the signer's public key in hex: the same for all claims of one owner's key."""
        return "ed25519:" + self.envelope.signer.hex()

    def signed_by(self, key: OwnerKey) -> bool:
        """Whether the signature's key is ``key``'s own."""
        return self.envelope.signer == public_bytes(key, PURPOSE)

    def with_stamp(self, response: bytes) -> ClaimFile:
        return replace(self, stamps=(*self.stamps, response))

    def to_bytes(self) -> bytes:
        """The file: canonical JSON and a line feed."""
        body: dict[str, Any] = {**self.envelope.to_json(), "timestamps": [to_base64(s) for s in self.stamps]}
        return canonical_json(body) + b"\n"

    @classmethod
    def from_bytes(cls, data: bytes) -> ClaimFile:
        """The claim in hostile ``data``; ClaimError where it is none. Whether it is true, checks must say."""
        body = parse_object(data, what="claim file", error=ClaimError, limit=MAX_CLAIM)
        rows = body.pop("timestamps", None)
        envelope = Envelope.from_json(body, what="claim file", error=ClaimError)
        if envelope.payload_type != PAYLOAD_TYPE or len(envelope.payload) > MAX_PAYLOAD:
            raise ClaimError(
                "The claim file is of another kind",
                expected=PAYLOAD_TYPE,
                found=envelope.payload_type[:80],
            )
        if not isinstance(rows, list) or len(rows) > MAX_STAMPS:
            raise ClaimError("The claim's time stamps make no sense", expected=f"at most {MAX_STAMPS}")
        stamps = tuple(from_base64(row, "timestamps", what="claim file", error=ClaimError) for row in rows)
        return cls(Claim.from_payload(envelope.payload), envelope, stamps)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a new file; OutputPathError if it exists or can't be written."""
        atomic_write(path, self.to_bytes())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> ClaimFile:
        """The claim in file ``path``; ClaimError if it can't be read."""
        return cls.from_bytes(read_limited(path, what="claim file", error=ClaimError, limit=MAX_CLAIM))
