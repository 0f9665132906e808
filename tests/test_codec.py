"""Safe writing, canonical JSON, and mark files good and hostile."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import stat
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gradmark import codec
from gradmark.codec import MarkFile, atomic_write, canonical_json
from gradmark.errors import MarkFileError, MismatchError, OutputPathError, UsageError
from gradmark.keys import OwnerKey
from gradmark.protocols import ModelSpec

GOLDEN = Path(__file__).parent / "golden"
KEY = OwnerKey(bytes(range(32)), "Acme Ltd")
SPEC = ModelSpec("image", (3, 32, 32), 10, 0.0, 1.0, 255, 1.0)
MARK = MarkFile.create(KEY, "filter-gradient", {"bits": 128, "band": (0.1, 0.4)}, SPEC, "signed-rank", 200)

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=10,
)


@given(json_values)
@settings(deadline=None)
def test_canonical_json_round_trip(value: Any) -> None:
    data = canonical_json(value)
    assert data.isascii()
    assert json.loads(data) == value
    assert canonical_json(json.loads(data)) == data


def test_canonical_json() -> None:
    assert canonical_json({"b": [1, 2.5, None], "a": "é"}) == b'{"a":"\\u00e9","b":[1,2.5,null]}'
    for bad in (float("nan"), [float("inf")], {1: 2}, [{"a": {2: 3}}], {"a": b"x"}, object()):
        with pytest.raises(UsageError, match="JSON"):
            canonical_json(bad)


def test_atomic_write(tmp_path: Path) -> None:
    path = tmp_path / "a"
    atomic_write(path, b"one", mode=0o600)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    with pytest.raises(OutputPathError, match="File exists") as caught:
        atomic_write(path, b"two")
    assert isinstance(caught.value.__cause__, FileExistsError)
    assert path.read_bytes() == b"one"
    atomic_write(str(path), b"three", overwrite=True)
    assert path.read_bytes() == b"three"
    for bad in (tmp_path / "none" / "a", path / "a", "a\0b"):
        with pytest.raises(OutputPathError):
            atomic_write(bad, b"x")
    with pytest.raises(OutputPathError):
        atomic_write(tmp_path, b"x", overwrite=True)
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("call", ["fsync", "open"])
def test_failed_write_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, overwrite: bool
) -> None:
    (tmp_path / "a").write_bytes(b"old")

    def fail(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as m:
        m.setattr(os, call, fail)
        with pytest.raises(OutputPathError, match="No space left"):
            atomic_write(tmp_path / "a", b"new", overwrite=overwrite)
    assert [p.name for p in tmp_path.iterdir()] == ["a"]
    assert (tmp_path / "a").read_bytes() == b"old"


def test_disk_without_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    atomic_write(tmp_path / "a", b"one", mode=0o600)
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o600
    with pytest.raises(OutputPathError, match="exists"):
        atomic_write(tmp_path / "a", b"two")
    assert (tmp_path / "a").read_bytes() == b"one"
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_round_trip(tmp_path: Path) -> None:
    assert MarkFile.from_bytes(MARK.to_bytes()) == MARK
    assert MARK.scheme_parameters == {"bits": 128, "band": [0.1, 0.4]}
    pretty = json.dumps(json.loads(MARK.to_bytes()), indent=2).encode()
    assert MarkFile.from_bytes(pretty).digest == MARK.digest
    MARK.save(tmp_path / "mark.json")
    written = (tmp_path / "mark.json").read_bytes()
    assert MARK.digest == "sha256:" + hashlib.sha256(written).hexdigest()
    assert MarkFile.load(tmp_path / "mark.json") == MARK
    with pytest.raises(OutputPathError):
        MARK.save(tmp_path / "mark.json")
    for bad in (tmp_path, tmp_path / "none"):
        with pytest.raises(MarkFileError, match="opened"):
            MarkFile.load(bad)


def test_golden_mark() -> None:
    mark = MarkFile.load(GOLDEN / "mark-v1.json")
    mark.check_key(KEY)
    assert mark.spec == SPEC
    assert mark.scheme_parameters == {"bits": 128, "band": [0.1, 0.4], "margin": 0.5}
    assert mark.digest == "sha256:" + hashlib.sha256((GOLDEN / "mark-v1.json").read_bytes()).hexdigest()


@pytest.mark.parametrize(
    "change",
    [
        {"scheme": "other"},
        {"scheme_parameters": {"bits": 127, "band": [0.1, 0.4]}},
        {"spec": replace(SPEC, n_classes=11)},
        {"test": "sign"},
        {"carriers": 201},
        {"salt": bytes(16)},
        {"commitment": "sha256:" + "0" * 64},
    ],
)
def test_commitment_covers_the_reading(change: dict[str, Any]) -> None:
    MARK.check_key(KEY)
    with pytest.raises(MismatchError, match="doesn't belong"):
        replace(MARK, **change).check_key(KEY)


def test_commitment_covers_the_key_alone() -> None:
    replace(MARK, extra={"created": "2030"}).check_key(KEY)
    for other in (OwnerKey.from_seed(1, "Acme Ltd"), OwnerKey(bytes(range(32)), "Evil Ltd")):
        with pytest.raises(MismatchError):
            MARK.check_key(other)
    assert MarkFile.create(KEY, "a", {}, SPEC, "sign", 1) != MarkFile.create(KEY, "a", {}, SPEC, "sign", 1)


def test_equal_specs_have_equal_bytes() -> None:
    whole = replace(MARK, spec=ModelSpec("image", (3, 32, 32), 10, 0, 1, 255, 1))
    assert whole.statement() == MARK.statement()


ABSURD: list[tuple[str, Any]] = [
    ("scheme", ""),
    ("scheme", "A b"),
    ("scheme", 3),
    ("parameters", []),
    ("test", "t-test"),
    ("carriers", 0),
    ("carriers", True),
    ("carriers", 1.5),
    ("carriers", 10**7),
    ("salt", "00"),
    ("salt", 7),
    ("salt", "AA" * 16),
    ("commitment", "sha256:xyz"),
    ("commitment", None),
    ("extra", "x"),
    ("spec", None),
    ("spec", {}),
    ("domain", "smell"),
    ("domain", []),
    ("input_shape", []),
    ("input_shape", "abc"),
    ("input_shape", [0]),
    ("input_shape", [1] * 5),
    ("input_shape", [65536, 65536]),
    ("input_shape", [1.0]),
    ("n_classes", 1),
    ("n_classes", 10**7),
    ("low", 2.0),
    ("low", "0"),
    ("high", 10**400),
    ("levels", 0),
    ("scale", 0),
    ("scale", -1),
    ("scale", None),
]


@pytest.mark.parametrize(("name", "value"), ABSURD)
def test_absurd_values(name: str, value: Any) -> None:
    body = json.loads(MARK.to_bytes())
    del body["checksum"]
    (body if name in body else body["spec"])[name] = value
    body["checksum"] = codec.sha256(canonical_json(body))
    with pytest.raises(MarkFileError):
        MarkFile.from_bytes(json.dumps(body).encode())


def test_tampered_and_foreign_files() -> None:
    raw = MARK.to_bytes()
    with pytest.raises(MarkFileError, match="changed or damaged"):
        MarkFile.from_bytes(raw.replace(b'"carriers":200', b'"carriers":201'))
    with pytest.raises(MarkFileError, match="gradmark-mark/1"):
        MarkFile.from_bytes(raw.replace(b"mark/1", b"mark/2"))
    with pytest.raises(MarkFileError, match="cut short"):
        MarkFile.from_bytes(raw[:-5])
    with pytest.raises(MarkFileError, match="changed or damaged"):
        MarkFile.from_bytes(raw.replace(b'"scale":1.0', b'"scale":1e999'))
    with pytest.raises(MarkFileError, match="too big"):
        MarkFile.from_bytes(b" " * (1 << 21))
    with pytest.raises(MarkFileError, match="stored"):
        replace(MARK, extra={"x": float("nan")})


@given(st.data())
@settings(deadline=None, max_examples=300)
def test_hostile_bytes(data: st.DataObject) -> None:
    raw = MARK.to_bytes()
    body = bytearray(raw[: data.draw(st.integers(0, len(raw)))] if data.draw(st.booleans()) else raw)
    for _ in range(data.draw(st.integers(0, 3))):
        if body:
            body[data.draw(st.integers(0, len(body) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(MarkFileError):
        assert MarkFile.from_bytes(bytes(body)) == MARK


@given(json_values, st.sampled_from(["parameters", "spec", "salt", "carriers", "extra", "test", "scheme"]))
@settings(deadline=None, max_examples=200)
def test_hostile_values_with_a_good_checksum(value: Any, name: str) -> None:
    body = json.loads(MARK.to_bytes())
    del body["checksum"]
    body[name] = value
    body["checksum"] = codec.sha256(canonical_json(body))
    with contextlib.suppress(MarkFileError):
        MarkFile.from_bytes(json.dumps(body).encode())
