"""The opening: a claim's key, disclosed to a judge. It holds the secret, for the judge's passphrase or plain.

Nothing less than the key will do: bits that were handed over by themselves could have been made to fit.
Whoever has it can read, and remove, every mark of that key.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field

from gradmark import keyfile
from gradmark.claim.file import ClaimFile
from gradmark.errors import ClaimError, KeyFileError, MismatchError, UsageError
from gradmark.files import atomic_write, canonical_json, parse_object, read_limited
from gradmark.keys import OwnerKey

FORMAT = "gradmark-opening/1"
MAX_OPENING = 2 * keyfile.MAX_KEY_BYTES


@dataclass(frozen=True)
class Opening:
    """``claim``: the digest of the claim that is opened; ``key``: the owner's."""

    claim: str
    key: OwnerKey = field(repr=False)

    @classmethod
    def of(cls, file: ClaimFile, key: OwnerKey) -> Opening:
        """The opening of ``file``. MismatchError unless ``key`` signed it and its mark commits to it."""
        file.claim.mark.check_key(key)
        if not file.signed_by(key) or file.claim.key_id != key.key_id:
            raise MismatchError(
                "The claim was signed with another key",
                expected=f"the key of {file.claim.owner!r} that signed it",
                found=f"key {key.key_id[:19]} of {key.owner!r}",
            )
        return cls(file.digest, key)

    def to_bytes(self, passphrase: str | None) -> bytes:
        """Canonical JSON of ``format``, ``claim`` and ``key``, a key file's object, and a line feed."""
        key = parse_object(
            self.key.to_bytes(passphrase), what="key", error=KeyFileError, limit=keyfile.MAX_KEY_BYTES
        )
        return canonical_json({"format": FORMAT, "claim": self.claim, "key": key}) + b"\n"

    @classmethod
    def from_bytes(cls, data: bytes, passphrase: str | None = None) -> Opening:
        """The opening in hostile ``data``. Raises ClaimError, KeyFileError or PassphraseError."""
        body = parse_object(data, what="opening", error=ClaimError, limit=MAX_OPENING)
        claim, key = body.get("claim"), body.get("key")
        if (
            body.keys() != {"format", "claim", "key"} or body["format"] != FORMAT
            or not isinstance(claim, str) or not isinstance(key, dict)
        ):  # fmt: skip
            raise ClaimError(
                "The opening can't be read",
                expected=f"format {FORMAT}, claim and key",
                found="other fields",  # not quoted: the file may hold a secret
                fix="Take the file that gradmark claim --disclose wrote",
            )
        try:
            content = canonical_json(key)
        except UsageError:
            raise ClaimError("The opening can't be read", expected="a key as gradmark writes it") from None
        return cls(claim, OwnerKey.from_bytes(content, passphrase))

    def save(self, path: str | os.PathLike[str], passphrase: str | None) -> None:
        """Write a new file, mode 0600; OutputPathError if it exists or can't be written."""
        atomic_write(path, self.to_bytes(passphrase), mode=0o600)

    @classmethod
    def load(cls, path: str | os.PathLike[str], passphrase: str | None = None) -> Opening:
        """The opening in file ``path``; raises as :meth:`from_bytes`, ClaimError if it can't be opened."""
        data = read_limited(path, what="opening", error=ClaimError, limit=MAX_OPENING)
        return cls.from_bytes(data, passphrase)
