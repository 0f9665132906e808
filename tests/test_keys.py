"""Keys: derivation against independent constructions, hiding of the secret, and hostile key files."""

from __future__ import annotations

import copy
import hashlib
import hmac
import json
import os
import pickle
import stat
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gradmark import catalog, files, keyfile
from gradmark.errors import GradmarkError, KeyFileError, OutputPathError, PassphraseError, UsageError
from gradmark.keys import OwnerKey, commitment_of
from gradmark.protocols import ModelSpec

GOLDEN = Path(__file__).parent / "golden"
SECRET = bytes(range(32))
KEY = OwnerKey(SECRET, "Acme Ltd")
# Computed with hmac, hashlib and struct alone.
GOLDEN_VALUES: dict[str, Any] = {
    "derive": "1d3d4f6dd26105db30e7000fa23a67343bcdee8a4f287881e1fe4df1db99f1bf",
    "key_id": "sha256:867650b8b2ec668dea35065e9d0e3677d61089f8789dd5c802b86a043f1bfa82",
    "commit": "sha256:92d16f15ab530ab7efafdad0482d3b252524ec2207da6236418f01e851f7906f",
    "bits": [1, -1, 1, -1, 1, -1, -1, 1, -1, -1, -1, 1],
    "permutation": [4, 6, 7, 5, 1, 2, 3, 0],
    "integers": [370, 887, 811, 25, 721, 703],
    "normals": [-0.224582522, -1.190419693, -0.124628991, -1.074006705],
    "seed7": "sha256:4cb80be00229745be654e45919290081208b2c97c548052f39b16ed294304a97",
}


@pytest.fixture(autouse=True)
def cheap_scrypt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keyfile, "SCRYPT_LOG2_N", 5)


def hkdf(secret: bytes, info: bytes, n: int) -> bytes:
    """RFC 5869 with SHA-256 and no salt, by the standard library alone."""
    prk = hmac.new(bytes(32), secret, hashlib.sha256).digest()
    out, block, i = b"", b"", 1
    while len(out) < n:
        block = hmac.new(prk, block + info + bytes([i]), hashlib.sha256).digest()
        out, i = out + block, i + 1
    return out[:n]


def info(purpose: bytes, context: bytes = b"") -> bytes:
    return (
        b"gradmark/v1/"
        + struct.pack(">I", len(purpose))
        + purpose
        + struct.pack(">I", len(context))
        + context
    )


def chacha20(key: bytes, n: int) -> bytes:
    """RFC 8439 with nonce 0 from block 0, in plain Python."""
    out = b""
    for counter in range((n + 63) // 64):
        start = [*struct.unpack("<4I", b"expand 32-byte k"), *struct.unpack("<8I", key), counter, 0, 0, 0]
        s = start.copy()
        rounds = [(0, 4, 8, 12), (1, 5, 9, 13), (2, 6, 10, 14), (3, 7, 11, 15)]
        rounds += [(0, 5, 10, 15), (1, 6, 11, 12), (2, 7, 8, 13), (3, 4, 9, 14)]
        for a, b, c, d in rounds * 10:
            for x, y, z, turn in ((a, b, d, 16), (c, d, b, 12), (a, b, d, 8), (c, d, b, 7)):
                s[x] = (s[x] + s[y]) & 0xFFFFFFFF
                s[z] = ((s[z] ^ s[x]) << turn | (s[z] ^ s[x]) >> (32 - turn)) & 0xFFFFFFFF
        out += struct.pack("<16I", *((p + q) & 0xFFFFFFFF for p, q in zip(s, start, strict=True)))
    return out[:n]


@given(st.text(max_size=20), st.binary(max_size=20), st.integers(0, 300))
@settings(deadline=None, max_examples=50)
def test_derive_is_hkdf(purpose: str, context: bytes, n: int) -> None:
    assert KEY.derive(purpose, n, context=context) == hkdf(SECRET, info(purpose.encode(), context), n)


def test_derive_long() -> None:
    long = KEY.derive("p", 8160 + 1000)
    stream_key = hkdf(SECRET, info(b"p") + struct.pack(">I", 6) + b"stream", 32)
    assert long == hkdf(SECRET, info(b"p"), 8160) + chacha20(stream_key, 1000)
    for n in (0, 1, 8159, 8160, 8161):
        assert KEY.derive("p", n) == long[:n]
    for n in (-1, (1 << 36) + 1):
        with pytest.raises(UsageError):
            KEY.derive("p", n)


def test_golden_values() -> None:
    """Values of the first release: if one changes, every mark out there is lost."""
    g = GOLDEN_VALUES
    assert KEY.derive("bits", 32, context=b"x").hex() == g["derive"]
    assert KEY.key_id == g["key_id"]
    assert KEY.commit(b"statement", b"salt") == g["commit"]
    assert KEY.uniform_bits("bits", 12).tolist() == g["bits"]
    assert KEY.permutation("order", 8).tolist() == g["permutation"]
    assert KEY.integers("draw", 6, 1000).tolist() == g["integers"]
    np.testing.assert_allclose(KEY.normals("dir", 4), g["normals"], rtol=1e-6)
    assert OwnerKey.from_seed(7).key_id == g["seed7"]


def test_labels_do_not_collide() -> None:
    outs = [
        KEY.derive(p, 32, context=c)
        for p, c in (("ab", b""), ("a", b"b"), ("", b"ab"), ("a", b""), ("", b"a"))
    ]
    assert len(set(outs)) == len(outs)


def test_streams_look_random() -> None:
    normals = KEY.normals("n", (100, 200))
    assert normals.shape == (100, 200)
    assert normals.dtype == np.float64
    assert (normals == normals.astype(np.float32)).all()
    assert abs(normals.mean()) < 0.03
    assert abs(normals.std() - 1) < 0.03
    bits = KEY.uniform_bits("b", 20001)
    assert bits.dtype == np.int8
    assert set(bits.tolist()) == {-1, 1}
    assert abs(bits.mean()) < 0.03
    assert KEY.normals("n", 0).shape == (0,)
    assert len(KEY.uniform_bits("b", 0)) == 0
    assert len(KEY.permutation("p", 0)) == 0


def test_small_permutations_are_uniform() -> None:
    counts: dict[tuple[int, ...], int] = {}
    for i in range(1200):
        order = tuple(KEY.permutation("p", 3, context=i.to_bytes(4, "big")).tolist())
        counts[order] = counts.get(order, 0) + 1
    assert len(counts) == 6
    assert max(abs(c - 200) for c in counts.values()) < 60


@given(st.integers(1, 1 << 63), st.integers(0, 50))
@settings(deadline=None, max_examples=60)
def test_integers_in_range(high: int, n: int) -> None:
    drawn = KEY.integers("i", n, high)
    assert drawn.shape == (n,)
    assert drawn.dtype == np.int64
    assert all(0 <= v < high for v in drawn.tolist())


def test_integers_reject_the_uneven_rest() -> None:
    high = (1 << 62) + 1  # a quarter of all words is rejected
    words = np.frombuffer(KEY.derive("i", 8 * 4000), dtype="<u8").tolist()
    expected = [w % high for w in words if w < (1 << 64) // high * high][:1000]
    assert KEY.integers("i", 1000, high).tolist() == expected
    with pytest.raises(UsageError):
        KEY.integers("i", 1, 0)


def test_commitment_binds() -> None:
    salt = bytes(16)
    c = KEY.commit(b"s", salt)
    assert c == commitment_of(KEY.derive("commitment", 32), "Acme Ltd", salt, b"s")
    assert KEY.verify_commitment(c, b"s", salt)
    assert not KEY.verify_commitment(c, b"t", salt)
    assert not KEY.verify_commitment(c, b"s", b"1" * 16)
    assert not OwnerKey(SECRET, "Acme Ltd.").verify_commitment(c, b"s", salt)
    assert not OwnerKey(bytes(32), "Acme Ltd").verify_commitment(c, b"s", salt)
    assert not KEY.verify_commitment("é", b"s", salt)


def test_secret_stays_inside() -> None:
    assert repr(KEY) == str(KEY) == f"OwnerKey(owner='Acme Ltd', key_id='{KEY.key_id[:19]}')"
    for attempt in (pickle.dumps, copy.copy, copy.deepcopy):
        with pytest.raises(TypeError, match="never pickled"):
            attempt(KEY)
    with pytest.raises(TypeError):
        vars(KEY)
    assert not hasattr(KEY, "secret")
    assert OwnerKey(SECRET, "Acme Ltd") == KEY
    assert hash(OwnerKey(SECRET, "Acme Ltd")) == hash(KEY)
    assert OwnerKey(SECRET, "Acme") != KEY
    assert OwnerKey(bytes(32), "Acme Ltd") != KEY
    assert KEY != "Acme Ltd"
    assert OwnerKey.generate("a") != OwnerKey.generate("a")


@pytest.mark.parametrize("owner", ["", "  ", "a\nb", "a\0", "x" * 201, "\ud800", "a\u202eb", "\u2028x", 3])
def test_bad_owner(owner: object) -> None:
    with pytest.raises(UsageError, match="name"):
        OwnerKey(SECRET, owner)  # type: ignore[arg-type]


def test_owner_is_normalised() -> None:
    assert OwnerKey(SECRET, " Cafe\u0301 ").owner == "Caf\u00e9"
    with pytest.raises(UsageError, match="32 bytes"):
        OwnerKey(b"short", "a")


@given(st.text(min_size=1, max_size=30).filter(lambda s: s.isprintable() and s.strip()), st.text(max_size=10))
@settings(deadline=None, max_examples=50)
def test_round_trip(owner: str, passphrase: str) -> None:
    key = OwnerKey.from_seed(1, owner)
    assert OwnerKey.from_bytes(key.to_bytes(None)) == key
    assert OwnerKey.from_bytes(key.to_bytes(None), "not needed") == key
    try:
        data = key.to_bytes(passphrase)
    except PassphraseError:
        assert passphrase == "" or any("\ud800" <= c <= "\udfff" for c in passphrase)
        return
    assert OwnerKey.from_bytes(data, passphrase) == key
    with pytest.raises(PassphraseError, match="wrong passphrase, or the file was changed"):
        OwnerKey.from_bytes(data, passphrase + "x")
    with pytest.raises(PassphraseError, match="protected"):
        OwnerKey.from_bytes(data)


def test_golden_files() -> None:
    assert OwnerKey.load(GOLDEN / "key-v1.json") == KEY
    assert OwnerKey.load(GOLDEN / "key-v1-passphrase.json", "correct horse") == KEY
    with pytest.raises(PassphraseError):
        OwnerKey.load(GOLDEN / "key-v1-passphrase.json", "wrong horse")


def test_changed_owner_is_noticed() -> None:
    for data, error in ((KEY.to_bytes("p"), PassphraseError), (KEY.to_bytes(None), KeyFileError)):
        assert b"Acme" in data
        with pytest.raises(error):
            OwnerKey.from_bytes(data.replace(b"Acme", b"Evil"), "p")


@pytest.mark.parametrize(
    "kdf",
    [
        {"log2_n": 40},
        {"log2_n": 20, "r": 8},
        {"p": 17},
        {"r": 0},
        {"log2_n": True},
        {"log2_n": "5"},
        {"x": 1},
    ],
)
def test_greedy_parameters_are_refused(kdf: dict[str, object], monkeypatch: pytest.MonkeyPatch) -> None:
    body = json.loads(KEY.to_bytes("p"))
    body["kdf"].update(kdf)
    monkeypatch.setattr(keyfile, "Scrypt", None)  # it must not come to that
    with pytest.raises(KeyFileError, match="changed or damaged"):
        OwnerKey.from_bytes(json.dumps(body).encode(), "p")


@pytest.mark.parametrize(
    ("data", "match"),
    [
        (b"", "cut short"),
        (b"[]", "JSON object"),
        (b"\xff\xfe", "cut short"),
        (b"[" * 60000, "cut short"),
        (b'{"format":"gradmark-key/2"}', "gradmark-key/1"),
        (b'{"format":"gradmark-key/1"}', "unknown protection"),
        (b'{"format":"gradmark-key/1","format":"gradmark-key/1"}', "cut short"),
        (b'{"format":"gradmark-key/1","protection":"none"}', "lacks fields"),
        (b'{"x":1e999,"y":NaN}', "cut short"),
        (b" " * 70000, "too big"),
    ],
)
def test_bad_bytes(data: bytes, match: str) -> None:
    with pytest.raises(KeyFileError, match=match):
        OwnerKey.from_bytes(data)


@given(st.booleans(), st.data())
@settings(deadline=None, max_examples=300)
def test_hostile_bytes(sealed: bool, data: st.DataObject) -> None:
    raw = KEY.to_bytes("p" if sealed else None)
    body = bytearray(raw[: data.draw(st.integers(0, len(raw)))] if data.draw(st.booleans()) else raw)
    for _ in range(data.draw(st.integers(0, 3))):
        if body:
            body[data.draw(st.integers(0, len(body) - 1))] = data.draw(st.integers(0, 255))
    try:
        key = OwnerKey.from_bytes(bytes(body), "p")
    except KeyFileError as e:
        assert "AAECAwQF" not in str(e)  # the secret's base64
        return
    assert key == KEY


def test_save_and_load(tmp_path: Path) -> None:
    path = tmp_path / "a.key"
    KEY.save(path, None)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert OwnerKey.load(path) == KEY
    before = path.read_bytes()
    with pytest.raises(KeyFileError, match="never overwritten"):
        OwnerKey.from_seed(1).save(path, None)
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(KeyFileError, match="never overwritten"):
        KEY.save(tmp_path / "link", None)
    assert path.read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.key", "link"]


def test_save_loses_a_race(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.key").write_text("other")
    monkeypatch.setattr(os.path, "lexists", lambda _: False)
    with pytest.raises(KeyFileError, match="never overwritten"):
        KEY.save(tmp_path / "a.key", None)
    assert (tmp_path / "a.key").read_text() == "other"


def test_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(OutputPathError, match="No space left"):
        KEY.save(tmp_path / "a.key", None)
    assert list(tmp_path.iterdir()) == []


def test_load_errors(tmp_path: Path) -> None:
    for bad in (tmp_path / "missing", tmp_path, "a\0b"):
        with pytest.raises(KeyFileError, match="opened"):
            OwnerKey.load(bad)
    (tmp_path / "big").write_bytes(b" " * 100_000)
    with pytest.raises(KeyFileError, match="too big"):
        OwnerKey.load(tmp_path / "big")
    assert issubclass(PassphraseError, KeyFileError)
    assert issubclass(KeyFileError, GradmarkError)


def test_secrets_larger_than_any_memory_are_refused_at_once() -> None:
    """A mark file may name a million bits and inputs of millions of pixels."""
    key = OwnerKey.from_seed(1)
    with pytest.raises(UsageError, match="larger than any memory"):
        key.normals("directions", (10**6, 3, 4096, 4096))
    with pytest.raises(UsageError, match="larger than any memory"):
        key.permutation("carriers", 1 << 28)
    spec = ModelSpec("image", (3, 4096, 4096), 10, 0.0, 1.0, 255)
    with pytest.raises(UsageError, match="larger than any memory"):
        catalog.scheme("trigger", {"bits": 10**6}).mark(key, spec)
