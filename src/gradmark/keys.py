"""The owner's secret, everything derived from it, and its file (see keyfile.py).

All derivation is HKDF-SHA256 (RFC 5869, no salt) with ``info = "gradmark/v1/" + L(purpose) + L(context)``,
where ``L(x)`` is the 4-byte big-endian length of ``x`` followed by ``x``; two labels can't collide.
"""

from __future__ import annotations

import hashlib
import hmac
import math
import os
import secrets
import unicodedata
from typing import NoReturn

import numpy as np
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from numpy.typing import NDArray
from scipy import special

from gradmark import keyfile
from gradmark.errors import KeyFileError, OutputPathError, UsageError
from gradmark.files import atomic_write, read_limited, sha256

_HKDF_MAX = 255 * 32
_MOST = 1 << 28  # numbers drawn at once
_BIDI = set("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


def _prefixed(*parts: bytes) -> bytes:
    return b"".join(len(part).to_bytes(4, "big") + part for part in parts)


def commitment_of(opening: bytes, owner: str, salt: bytes, statement: bytes) -> str:
    """``sha256:`` of ``"gradmark/v1/commitment" + L(opening) + L(owner) + L(salt) + L(statement)``.

    Anybody can check a commitment with it once the owner shows ``opening``, which is
    ``key.derive("commitment", 32)`` and tells nothing about the rest of the key.
    """
    return sha256(b"gradmark/v1/commitment" + _prefixed(opening, owner.encode(), salt, statement))


class OwnerKey:
    """A 256-bit secret and its owner's name. Never printed, copied or pickled.

    ``secret``: 32 bytes. ``owner``: 1 to 200 characters, brought to Unicode NFC and stripped of outer
    spaces; no control characters. Raises UsageError. The purposes ``"key-id"`` and ``"commitment"`` of
    :meth:`derive` are taken.
    """

    __slots__ = ("__secret", "_owner")
    __secret: bytes
    _owner: str

    def __init__(self, secret: bytes, owner: str) -> None:
        if len(secret) != 32:
            raise UsageError(
                "The secret has the wrong size", expected="32 bytes", fix="Use OwnerKey.generate"
            )
        self.__secret = bytes(secret)
        self._owner = clean_owner(owner)

    @classmethod
    def generate(cls, owner: str) -> OwnerKey:
        """A fresh key from the system's randomness."""
        return cls(secrets.token_bytes(32), owner)

    @classmethod
    def from_seed(cls, seed: int, owner: str = "test") -> OwnerKey:
        """For tests and benchmarks only: anybody who guesses the seed has the key."""
        return cls(
            hashlib.sha256(b"gradmark/v1/insecure-test-seed" + str(int(seed)).encode()).digest(), owner
        )

    @property
    def owner(self) -> str:
        """The owner's name, public."""
        return self._owner

    @property
    def key_id(self) -> str:
        """Public fingerprint of the secret: ``sha256:`` of ``derive("key-id", 32)``."""
        return sha256(self.derive("key-id", 32))

    def derive(self, purpose: str, n_bytes: int, *, context: bytes = b"") -> bytes:
        """``n_bytes`` that only this key gives for this purpose and context.

        HKDF-SHA256 for the first 8160 bytes, all that HKDF can give; what comes after is the ChaCha20
        stream (nonce and counter 0) under the HKDF output for ``info + L("stream")``. Hence
        ``derive(p, m) == derive(p, n)[:m]`` for all m <= n. Raises UsageError on a size outside 0..2**36.
        """
        if not 0 <= n_bytes <= 1 << 36:
            raise UsageError("The number of bytes is out of range", expected="0 to 2**36", found=str(n_bytes))
        info = b"gradmark/v1/" + _prefixed(purpose.encode(), context)
        if n_bytes == 0:
            return b""
        head = self.__hkdf(info, min(n_bytes, _HKDF_MAX))
        if n_bytes <= _HKDF_MAX:
            return head
        stream_key = self.__hkdf(info + _prefixed(b"stream"), 32)
        cipher = Cipher(algorithms.ChaCha20(stream_key, bytes(16)), mode=None).encryptor()
        return head + cipher.update(bytes(n_bytes - _HKDF_MAX))

    def __hkdf(self, info: bytes, n_bytes: int) -> bytes:
        return HKDF(algorithm=hashes.SHA256(), length=n_bytes, salt=None, info=info).derive(self.__secret)

    def uniform_bits(self, purpose: str, n: int, context: bytes = b"") -> NDArray[np.int8]:
        """(n,) fair signs, +1 or -1."""
        raw = np.frombuffer(self.derive(purpose, (n + 7) // 8, context=context), dtype=np.uint8)
        return np.unpackbits(raw, count=n).astype(np.int8) * np.int8(2) - np.int8(1)

    def normals(
        self, purpose: str, shape: int | tuple[int, ...], context: bytes = b""
    ) -> NDArray[np.float64]:
        """Standard normals of the given shape: float64 that hold float32 values.

        ``ndtri((2 w + 1) / 2**53)`` of 52-bit words ``w``, exactly symmetric and never infinite. Platforms
        may differ in the last float64 place of ``ndtri``; rounding to float32 hides that but for one value
        in some 2**29, and there by one float32 step.
        """
        shape = (shape,) if isinstance(shape, int) else tuple(shape)
        uniforms = ((self.__words(purpose, math.prod(shape), context) >> 12) * 2 + 1) * 2.0**-53
        values: NDArray[np.float64] = special.ndtri(uniforms).astype(np.float32).astype(np.float64)
        return values.reshape(shape)

    def permutation(self, purpose: str, n: int, context: bytes = b"") -> NDArray[np.int64]:
        """(n,) a uniformly random order of 0..n-1: the sorting order of n 128-bit keys."""
        words = self.__words(purpose, 2 * n, context).reshape(n, 2)
        return np.lexsort((words[:, 1], words[:, 0])).astype(np.int64)

    def integers(self, purpose: str, n: int, high: int, context: bytes = b"") -> NDArray[np.int64]:
        """(n,) integers uniform in 0..high-1, without modulo bias; 1 <= high <= 2**63."""
        if not 1 <= high <= 1 << 63:
            raise UsageError("The bound is out of range", expected="1 to 2**63", found=str(high))
        last = np.uint64((1 << 64) - (1 << 64) % high - 1)  # words above it would favour small results
        drawn = n + 16
        while True:
            words = self.__words(purpose, drawn, context)
            accepted = words[words <= last]
            if len(accepted) >= n:
                return (accepted[:n] % np.uint64(high)).astype(np.int64)
            drawn *= 2

    def __words(self, purpose: str, n: int, context: bytes) -> NDArray[np.uint64]:
        check_amount(n)
        raw = self.derive(purpose, 8 * n, context=context)
        return np.frombuffer(raw, dtype="<u8").astype(np.uint64)

    def commit(self, statement: bytes, salt: bytes) -> str:
        """A promise about ``statement`` that hides it and that no other key or owner can claim."""
        return commitment_of(self.derive("commitment", 32), self._owner, salt, statement)

    def verify_commitment(self, commitment: str, statement: bytes, salt: bytes) -> bool:
        """Whether ``commitment`` is this key's for ``statement``; takes the same time either way."""
        return hmac.compare_digest(commitment.encode(), self.commit(statement, salt).encode())

    def to_bytes(self, passphrase: str | None) -> bytes:
        """The key file's bytes; unprotected if ``passphrase`` is None. PassphraseError if it is empty."""
        return keyfile.seal(self.__secret, self._owner, passphrase)

    @classmethod
    def from_bytes(cls, data: bytes, passphrase: str | None = None) -> OwnerKey:
        """The key in ``data``. KeyFileError, or PassphraseError; an unneeded passphrase is ignored."""
        secret, owner = keyfile.unseal(data, passphrase)
        try:
            return cls(secret, owner)
        except UsageError:
            raise keyfile.damaged("without a legal owner's name or secret") from None

    def save(self, path: str | os.PathLike[str], passphrase: str | None) -> None:
        """Write the key file, mode 0600, never over an existing file and never by halves.

        KeyFileError if ``path`` exists, OutputPathError if it can't be written.
        """
        if os.path.lexists(path):  # before the costly stretching; atomic_write decides for good
            raise _exists(path)
        try:
            atomic_write(path, self.to_bytes(passphrase), mode=0o600)
        except OutputPathError as e:
            if isinstance(e.__cause__, FileExistsError):
                raise _exists(path) from e
            raise

    @classmethod
    def load(cls, path: str | os.PathLike[str], passphrase: str | None = None) -> OwnerKey:
        """The key in file ``path``; raises as :meth:`from_bytes`, KeyFileError if it can't be opened."""
        data = read_limited(path, what="key file", error=KeyFileError, limit=keyfile.MAX_KEY_BYTES)
        return cls.from_bytes(data, passphrase)

    def __repr__(self) -> str:
        return f"OwnerKey(owner={self._owner!r}, key_id={self.key_id[:19]!r})"

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, OwnerKey):
            return NotImplemented
        same = hmac.compare_digest(self.__secret, other.__secret)
        return same and self._owner == other._owner

    def __hash__(self) -> int:
        return hash((self.key_id, self._owner))

    def _refuse(self, *_: object) -> NoReturn:
        raise TypeError("An OwnerKey is never pickled or copied; save it to a key file instead.")

    __reduce__ = __reduce_ex__ = __getstate__ = __copy__ = __deepcopy__ = _refuse


def check_amount(n: int) -> None:
    """UsageError where ``n`` numbers of a mark's secrets are too many, as a hostile mark file may ask for."""
    if n > _MOST:
        raise UsageError(
            "The mark's secrets are larger than any memory should hold",
            expected=f"{_MOST:,} numbers at most", found=f"{n:,}", fix="Take fewer bits",
        )  # fmt: skip


def _exists(path: str | os.PathLike[str]) -> KeyFileError:
    return KeyFileError(
        "A key file is never overwritten",
        expected="a new path",
        found=f"an existing file: {os.fspath(path)}",
        fix="Choose another path",
    )


def clean_owner(owner: object) -> str:
    """``owner`` in NFC; UsageError unless it is 1 to 200 printable characters."""
    text = unicodedata.normalize("NFC", owner) if isinstance(owner, str) else ""
    # Line breaks, lone surrogates and direction overrides could make a report show another name.
    bad = any(unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp") or c in _BIDI for c in text)
    clean = text.strip()
    if not 1 <= len(clean) <= 200 or bad:
        raise UsageError(
            "The owner's name can't be used",
            expected="1 to 200 characters without control characters",
            found=f"{len(clean)} characters" + (", some of them control characters" if bad else ""),
            fix="Give the owner's plain name",
        )
    return clean
