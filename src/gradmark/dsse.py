"""Signed statements: a payload in a DSSE envelope under an Ed25519 key that follows from the owner's.

DSSE (Dead Simple Signing Envelope, version 1.0.2): the signature is over
``"DSSEv1" SP len(type) SP type SP len(payload) SP payload``, so that a payload of one type can't pass
for another. The signing key's seed is ``key.derive(purpose, 32)``: a label of its own for every use.
"""

from __future__ import annotations

import base64
import binascii
from dataclasses import dataclass
from typing import Any

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from gradmark.errors import GradmarkError
from gradmark.files import canonical_json
from gradmark.keys import OwnerKey


def signing_key(key: OwnerKey, purpose: str) -> Ed25519PrivateKey:
    """The Ed25519 key of ``purpose`` (RFC 8032), from HKDF."""
    return Ed25519PrivateKey.from_private_bytes(key.derive(purpose, 32))


def public_bytes(key: OwnerKey, purpose: str) -> bytes:
    """The public half of :func:`signing_key`, 32 bytes."""
    return signing_key(key, purpose).public_key().public_bytes(Encoding.Raw, PublicFormat.Raw)


def pae(payload_type: str, payload: bytes) -> bytes:
    """DSSE's pre-authentication encoding: the bytes that are signed."""
    kind = payload_type.encode()
    return b"DSSEv1 %d %s %d %s" % (len(kind), kind, len(payload), payload)


@dataclass(frozen=True)
class Envelope:
    """``payload`` of ``payload_type`` with one signature; ``signer``: its public key, 32 bytes."""

    payload_type: str
    payload: bytes
    signer: bytes
    signature: bytes

    @classmethod
    def sign(cls, key: OwnerKey, purpose: str, payload_type: str, payload: bytes) -> Envelope:
        """Signed by ``key``'s signing key of ``purpose``."""
        signature = signing_key(key, purpose).sign(pae(payload_type, payload))
        return cls(payload_type, payload, public_bytes(key, purpose), signature)

    def verifies(self) -> bool:
        """Whether the signature is ``signer``'s. Whose key that is, the payload and its reader must say."""
        try:
            Ed25519PublicKey.from_public_bytes(self.signer).verify(
                self.signature, pae(self.payload_type, self.payload)
            )
        except (InvalidSignature, ValueError):
            return False
        return True

    def to_json(self) -> dict[str, Any]:
        """``{"payload", "payloadType", "signatures": [{"keyid", "sig"}]}``; the keyid is the public key."""
        return {
            "payload": to_base64(self.payload),
            "payloadType": self.payload_type,
            "signatures": [{"keyid": to_base64(self.signer), "sig": to_base64(self.signature)}],
        }

    def to_bytes(self) -> bytes:
        """Canonical JSON of :meth:`to_json`: what a time stamp is taken of."""
        return canonical_json(self.to_json())

    @classmethod
    def from_json(cls, body: dict[str, Any], *, what: str, error: type[GradmarkError]) -> Envelope:
        """The envelope in a JSON object of just these fields; raises ``error``, also on doubtful spelling."""
        rows = body.get("signatures")
        row = rows[0] if isinstance(rows, list) and len(rows) == 1 else None
        kind, fields = body.get("payloadType"), {"payload", "payloadType", "signatures"}
        signed = isinstance(row, dict) and row.keys() == {"keyid", "sig"}
        if body.keys() != fields or not isinstance(kind, str) or not signed or not isinstance(row, dict):
            raise error(
                f"The {what} is no envelope",
                expected="a DSSE envelope with payload, payloadType and one signature",
                found=", ".join(sorted(body))[:200] or "an empty object",
                fix="Take the file that gradmark wrote",
            )
        payload, signer, signature = (
            from_base64(text, name, what=what, error=error)
            for text, name in ((body["payload"], "payload"), (row["keyid"], "keyid"), (row["sig"], "sig"))
        )
        try:
            kind.encode()
        except UnicodeEncodeError:
            raise error(f"The {what} is no envelope", expected="a payloadType in plain text") from None
        return cls(kind, payload, signer, signature)


def to_base64(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")


def from_base64(text: object, name: str, *, what: str, error: type[GradmarkError]) -> bytes:
    """The bytes in base64 ``text``, spelt in the one way; raises ``error`` on all else."""
    try:
        data = base64.b64decode(text, validate=True) if isinstance(text, str) else b""
    except (binascii.Error, ValueError):
        data = b""
    if not data or to_base64(data) != text:
        raise error(
            f"The {what}'s field {name} makes no sense",
            expected="base64, with padding",
            fix="Take an undamaged copy",
        )
    return data


__all__ = ["Envelope", "from_base64", "pae", "public_bytes", "signing_key", "to_base64"]
