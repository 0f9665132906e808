"""The seal file, ``gradmark-seal/1``: canonical JSON, signed by a key of the owner's (docs/formats.md).

It holds no secret of the key. But whoever has the probes can train a changed model until it passes them: a
seal with probes is kept as private as the model, one without may be published.
"""

from __future__ import annotations

import base64
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from gradmark.codec import checked_spec, spec_from
from gradmark.errors import MarkFileError, MismatchError, SealFileError, UsageError
from gradmark.files import atomic_write, canonical_json, parse_object, read_limited, sha256
from gradmark.keys import OwnerKey
from gradmark.protocols import ModelSpec
from gradmark.seal.fields import (
    SHA,
    absurd,
    decoded,
    matching,
    only_fields,
    probes_from,
    probes_json,
    record_json,
    records_from,
    text,
)  # fmt: skip
from gradmark.seal.manifest import TensorRecord
from gradmark.seal.probes import Probes, detection_limit

SEAL_FORMAT = "gradmark-seal/1"
MAX_SEAL_BYTES = 1 << 28
_SIGNER = re.compile(r"ed25519:[0-9a-f]{64}")
_HEX16, _HEX32 = re.compile(r"[0-9a-f]{16}"), re.compile(r"[0-9a-f]{32}")


@dataclass(frozen=True)
class SealFile:
    """A seal, checked on construction: SealFileError where a value makes no sense.

    ``model``: digest of the sealed file. ``salt`` (16 bytes) went into all that the key drew. ``seed``: of
    the manifest's summaries, 16 hex digits. ``signer``, ``signature``: Ed25519.
    """

    owner: str
    created: str
    model: str
    spec: ModelSpec
    salt: str
    seed: str
    tensors: tuple[TensorRecord, ...]
    probes: Probes | None
    version: str
    signer: str = ""
    signature: bytes = field(default=b"", repr=False)

    def body(self) -> dict[str, Any]:
        """All that is signed, as JSON values."""
        return {
            "format": SEAL_FORMAT, "owner": self.owner, "created": self.created, "model": self.model,
            "spec": self.spec.to_json(), "salt": self.salt, "seed": self.seed,
            "tensors": [record_json(r) for r in self.tensors],
            "probes": None if self.probes is None else probes_json(self.probes, self.spec),
            "version": self.version, "signer": self.signer,
        }  # fmt: skip

    def signed(self, key: OwnerKey) -> SealFile:
        """The same seal with the signature of ``key``."""
        private = signing_key(key)
        blank = replace(self, signer=signer_of(key), signature=b"")
        return replace(blank, signature=private.sign(_message(blank.body())))

    def check_key(self, key: OwnerKey) -> None:
        """MismatchError unless this key sealed it."""
        if self.signer != signer_of(key):
            raise MismatchError(
                "The key didn't make this seal", expected=f"the key of {self.signer[:20]}",
                found=f"{signer_of(key)[:20]}", fix="Use the key that the model was sealed with",
            )  # fmt: skip

    def limits(self) -> dict[str, float | None]:
        """Relative noise on any one weight tensor that shows, by kind of answer; empty without probes."""
        if self.probes is None:
            return {}
        shown = {f"{d} decimals": detection_limit(self.probes, "probabilities", d) for d in (6, 4, 3, 2)}
        return {"logits": detection_limit(self.probes, "logits"), **shown,
                "labels": detection_limit(self.probes, "labels")}  # fmt: skip

    @property
    def queries(self) -> int:
        """Inputs that a check sends at most: every probe twice, and the anchors."""
        return 0 if self.probes is None else 2 * len(self.probes.x) + len(self.probes.anchors)

    @property
    def digest(self) -> str:
        """``sha256:`` of the file."""
        return sha256(self.to_bytes())

    def to_bytes(self) -> bytes:
        signature = base64.b64encode(self.signature).decode()
        return canonical_json({**self.body(), "signature": signature})

    @classmethod
    def from_bytes(cls, data: bytes) -> SealFile:
        """The seal in ``data``; SealFileError where it is damaged, absurd, unsigned or of another format."""
        body = parse_object(data, what="seal", error=SealFileError, limit=MAX_SEAL_BYTES)
        if body.get("format") != SEAL_FORMAT:
            found = repr(body.get("format"))[:60]
            fix = "Use a seal that gradmark wrote, or update gradmark"
            raise SealFileError("The seal's format is unknown", expected=SEAL_FORMAT, found=found, fix=fix)
        only_fields(body, _BODY, "the seal")
        signature = decoded(body.pop("signature"), "signature", 64)
        _check_signature(body, signature)
        try:
            spec = checked_spec(spec_from(body["spec"]))
        except MarkFileError as e:
            raise absurd("spec", f"{e.what}: {e.found}") from None
        return cls(
            owner=text(body["owner"], "owner"),
            created=text(body["created"], "created"),
            model=matching(body["model"], SHA, "model"),
            spec=spec,
            salt=matching(body["salt"], _HEX32, "salt"),
            seed=matching(body["seed"], _HEX16, "seed"),
            tensors=records_from(body["tensors"]),
            probes=None if body["probes"] is None else probes_from(body["probes"], spec),
            version=text(body["version"], "version"),
            signer=body["signer"],
            signature=signature,
        )

    def save(self, path: str | os.PathLike[str], *, overwrite: bool = False) -> None:
        """Write the file as a whole or not at all, mode 0600; OutputPathError if it can't be."""
        atomic_write(path, self.to_bytes(), mode=0o600, overwrite=overwrite)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> SealFile:
        """The seal in file ``path``; SealFileError if it can't be read."""
        return cls.from_bytes(read_limited(path, what="seal", error=SealFileError, limit=MAX_SEAL_BYTES))


def signing_key(key: OwnerKey) -> Ed25519PrivateKey:
    """The owner's Ed25519 key for seals: its seed is ``derive("seal-signature", 32)``."""
    return Ed25519PrivateKey.from_private_bytes(key.derive("seal-signature", 32))


def signer_of(key: OwnerKey) -> str:
    """``ed25519:`` and the public key in hex: the same for all seals of one owner's key."""
    return "ed25519:" + signing_key(key).public_key().public_bytes_raw().hex()


def _message(body: Mapping[str, Any]) -> bytes:
    content = canonical_json(dict(body))
    return b"gradmark/v1/seal" + len(content).to_bytes(4, "big") + content


def _check_signature(body: dict[str, Any], signature: bytes) -> None:
    signer = matching(body["signer"], _SIGNER, "signer")
    try:
        public = Ed25519PublicKey.from_public_bytes(bytes.fromhex(signer.partition(":")[2]))
        public.verify(signature, _message(body))
    except (InvalidSignature, ValueError, UsageError):
        raise SealFileError(
            "The seal was changed or damaged", expected="a signature that fits the content",
            found="another one", fix="Take an undamaged copy",
        ) from None  # fmt: skip


_BODY = {"format", "owner", "created", "model", "spec", "salt", "seed", "tensors", "probes", "version",
         "signer", "signature"}  # fmt: skip
__all__ = ["MAX_SEAL_BYTES", "SEAL_FORMAT", "SealFile", "signer_of", "signing_key"]
