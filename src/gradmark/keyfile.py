"""The key file's bytes.

Key file: one JSON object, ``{"format": "gradmark-key/1", "owner", "protection", ...}``. With
``"protection": "scrypt+chacha20-poly1305"`` come ``kdf`` (``log2_n, r, p, salt``), ``nonce`` and
``ciphertext`` (base64); the AEAD's associated data is the canonical JSON of all fields but the last. With
``"protection": "none"`` come ``secret`` (base64) and ``checksum``, which finds damage, not malice.
"""

from __future__ import annotations

import base64
import binascii
import secrets
import unicodedata
from typing import Any

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.kdf.scrypt import Scrypt

from gradmark.errors import KeyFileError, PassphraseError, UsageError
from gradmark.files import canonical_json, parse_object, sha256

KEY_FORMAT = "gradmark-key/1"
SEALED = "scrypt+chacha20-poly1305"
MAX_KEY_BYTES = 64 << 10
SCRYPT_LOG2_N = 17
"""Cost of new key files (r=8, p=1): 128 MiB and about half a second. Tests lower it."""


def seal(secret: bytes, owner: str, passphrase: str | None) -> bytes:
    """The key file's bytes; unprotected if ``passphrase`` is None. PassphraseError if it is empty."""
    header: dict[str, Any] = {"format": KEY_FORMAT, "owner": owner}
    if passphrase is None:
        body = {**header, "protection": "none", "secret": _to_base64(secret)}
        return canonical_json({**body, "checksum": sha256(canonical_json(body))}) + b"\n"
    kdf = {"log2_n": SCRYPT_LOG2_N, "r": 8, "p": 1, "salt": _to_base64(secrets.token_bytes(16))}
    nonce = secrets.token_bytes(12)
    body = {**header, "protection": SEALED, "kdf": kdf, "nonce": _to_base64(nonce)}
    sealed = ChaCha20Poly1305(_stretch(passphrase, kdf)).encrypt(nonce, secret, canonical_json(body))
    return canonical_json({**body, "ciphertext": _to_base64(sealed)}) + b"\n"


def unseal(data: bytes, passphrase: str | None) -> tuple[bytes, Any]:
    """The secret and the owner's name, not yet checked, in ``data``; KeyFileError or PassphraseError."""
    body = parse_object(data, what="key file", error=KeyFileError, limit=MAX_KEY_BYTES)
    if body.get("format") != KEY_FORMAT:
        raise KeyFileError(
            "The key file's format is unknown",
            expected=KEY_FORMAT,
            found="another format or version",  # not quoted: the file may be somebody's secret
            fix="Use a key file that gradmark wrote, or update gradmark",
        )
    protection = body.get("protection")
    if protection == "none":
        secret = _open_plain(body)
    elif protection == SEALED:
        secret = _open_sealed(body, passphrase)
    else:
        raise damaged("of an unknown protection")
    return secret, body["owner"]


def _stretch(passphrase: str, kdf: dict[str, Any]) -> bytes:
    """scrypt of the NFC passphrase; the caller vouches for the cost parameters."""
    try:
        raw = unicodedata.normalize("NFC", passphrase).encode()
    except UnicodeEncodeError:
        raw = b""
    if not raw:
        raise PassphraseError("The passphrase is empty or not text", fix="Give a passphrase, or none at all")
    salt = _from_base64(kdf["salt"], 16)
    try:
        return Scrypt(salt=salt, length=32, n=1 << kdf["log2_n"], r=kdf["r"], p=kdf["p"]).derive(raw)
    except MemoryError:
        raise KeyFileError(
            "Too little memory to open the key file",
            expected=f"{_scrypt_mib(kdf)} MiB",
            fix="Free some memory",
        ) from None


def _scrypt_mib(kdf: dict[str, Any]) -> int:
    return int((128 * kdf["r"] << kdf["log2_n"]) >> 20)


def _open_plain(body: dict[str, Any]) -> bytes:
    _check_fields(body, {"format", "owner", "protection", "secret", "checksum"})
    rest = {name: value for name, value in body.items() if name != "checksum"}
    if body["checksum"] != _digest(rest):
        raise damaged("whose checksum doesn't fit")
    return _from_base64(body["secret"], 32)


def _open_sealed(body: dict[str, Any], passphrase: str | None) -> bytes:
    _check_fields(body, {"format", "owner", "protection", "kdf", "nonce", "ciphertext"})
    kdf = body["kdf"]
    if not isinstance(kdf, dict) or set(kdf) != {"log2_n", "r", "p", "salt"}:
        raise damaged("without key derivation parameters")
    # A hostile file must not eat the memory or the day: at most 256 MiB and eight times the usual work.
    limits = {"log2_n": (4, 20), "r": (1, 32), "p": (1, 16)}
    for name, (low, high) in limits.items():
        if type(kdf[name]) is not int or not low <= kdf[name] <= high:
            raise damaged(f"whose {name} isn't between {low} and {high}")
    work = kdf["r"] << kdf["log2_n"]
    if work > 1 << 21 or work * kdf["p"] > 1 << 23:
        raise damaged("that asks for too much memory or time")
    nonce, sealed = _from_base64(body["nonce"], 12), _from_base64(body["ciphertext"], 48)
    _from_base64(kdf["salt"], 16)
    if passphrase is None:
        raise PassphraseError(
            "The key file is protected",
            expected="a passphrase",
            found="none",
            fix="Give --passphrase-file or set GRADMARK_PASSPHRASE",
        )
    header = {name: value for name, value in body.items() if name != "ciphertext"}
    try:
        associated = canonical_json(header)
    except UsageError:
        raise damaged("with values that can't be") from None
    try:
        return ChaCha20Poly1305(_stretch(passphrase, kdf)).decrypt(nonce, sealed, associated)
    except InvalidTag:
        raise PassphraseError(
            "The key file can't be opened",
            expected="the passphrase and the file it was written with",
            found="a wrong passphrase, or the file was changed",
            fix="Check the passphrase; if it is right, take an undamaged copy of the file",
        ) from None


def _digest(body: dict[str, Any]) -> str:
    try:
        return sha256(canonical_json(body))
    except UsageError:
        raise damaged("with values that can't be") from None


def _check_fields(body: dict[str, Any], expected: set[str]) -> None:
    if set(body) != expected:
        raise damaged("that lacks fields or has others")


def _to_base64(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")


def _from_base64(text: object, n_bytes: int) -> bytes:
    """The ``n_bytes`` in strict base64 ``text``; KeyFileError otherwise."""
    try:
        data = base64.b64decode(text, validate=True) if isinstance(text, str) else b""
    except (binascii.Error, ValueError):
        data = b""
    if len(data) != n_bytes or _to_base64(data) != text:
        raise damaged("with a field of the wrong size")
    return data


def damaged(found: str) -> KeyFileError:
    return KeyFileError(
        "The key file was changed or damaged",
        expected="a key file as gradmark wrote it",
        found=f"one {found}",
        fix="Take an undamaged copy",
    )
