"""The public mark file.

A mark file holds no secret. Its commitment ties it to one key, its checksum finds damage. Format, byte
for byte: the canonical JSON (sorted keys, no spaces, ASCII) of ``{"format": "gradmark-mark/1", "scheme",
"parameters", "spec", "test", "carriers", "salt" (32 hex digits), "commitment", "extra", "checksum"}``,
where ``checksum`` is ``sha256:`` + the hex SHA-256 of the canonical JSON of all the other fields.
"""

from __future__ import annotations

import json
import math
import os
import re
import secrets
from dataclasses import asdict, dataclass, field
from typing import Any, get_args

from gradmark.errors import MarkFileError, MismatchError, UsageError
from gradmark.files import atomic_write, canonical_json, parse_object, read_limited, sha256
from gradmark.keys import OwnerKey
from gradmark.protocols import Domain, ModelSpec, TestName

MARK_FORMAT = "gradmark-mark/1"
MAX_MARK_BYTES = 1 << 20
_SHA = re.compile(r"sha256:[0-9a-f]{64}")
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")


@dataclass(frozen=True)
class MarkFile:
    """What the world may know of a mark: enough to read it again with the key, useless without.

    ``salt`` has 16 bytes; ``commitment`` is ``key.commit(statement(), salt)``; ``extra`` is public
    information (version, date) that the reading doesn't depend on and the commitment doesn't cover.
    Every construction is checked: MarkFileError on absurd values.
    """

    scheme: str
    scheme_parameters: dict[str, Any]
    spec: ModelSpec
    test: TestName
    carriers: int
    salt: bytes
    commitment: str
    extra: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _require(_is_text(self.scheme, _NAME), "scheme", self.scheme)
        _require(self.test in get_args(TestName), "test", self.test)
        _require(_is_int(self.carriers, 1, 10**6), "carriers", self.carriers)
        _require(_has_type(self.salt, bytes) and len(self.salt) == 16, "salt", "not 16 bytes")
        _require(_is_text(self.commitment, _SHA), "commitment", self.commitment)
        object.__setattr__(self, "spec", checked_spec(self.spec))
        for name in ("scheme_parameters", "extra"):
            value = getattr(self, name)
            _require(isinstance(value, dict), name, type(value).__name__)
            try:  # an own copy, with tuples as lists: what a reader of the file will see
                object.__setattr__(self, name, json.loads(canonical_json(value)))
            except UsageError as e:
                what = f"The mark's {name} can't be stored"
                raise MarkFileError(what, expected=e.expected, found=e.found) from e

    @classmethod
    def create(
        cls,
        key: OwnerKey,
        scheme_name: str,
        parameters: dict[str, Any],
        spec: ModelSpec,
        test: TestName,
        carriers: int,
        *,
        extra: dict[str, Any] | None = None,
        salt: bytes | None = None,
    ) -> MarkFile:
        """A mark file committed to ``key``; ``salt`` (16 bytes) is fresh unless given for a test."""
        salt = secrets.token_bytes(16) if salt is None else salt
        blank = cls(scheme_name, parameters, spec, test, carriers, salt, "sha256:" + "0" * 64, extra or {})
        commitment = key.commit(blank.statement(), salt)
        return cls(scheme_name, parameters, spec, test, carriers, salt, commitment, extra or {})

    def statement(self) -> bytes:
        """Canonical bytes of all that determines a reading: what the commitment is about."""
        return canonical_json({"format": MARK_FORMAT, **self._reading_fields()})

    def check_key(self, key: OwnerKey) -> None:
        """MismatchError unless this mark was committed to with exactly this key, owner's name included."""
        if not key.verify_commitment(self.commitment, self.statement(), self.salt):
            raise MismatchError(
                "The key doesn't belong to this mark",
                expected=f"the key and owner's name that commitment {self.commitment[:19]} was made with",
                found=f"key {key.key_id[:19]} of {key.owner!r}",
                fix="Use the key that the model was marked with and the mark file as it was written",
            )

    @property
    def digest(self) -> str:
        """``sha256:`` of :meth:`to_bytes`: the same as ``sha256sum`` of the file as written."""
        return sha256(self.to_bytes())

    def to_bytes(self) -> bytes:
        """The file's bytes; see the module's docstring."""
        body = {
            "format": MARK_FORMAT,
            **self._reading_fields(),
            "salt": self.salt.hex(),
            "commitment": self.commitment,
            "extra": self.extra,
        }
        return canonical_json({**body, "checksum": sha256(canonical_json(body))})

    @classmethod
    def from_bytes(cls, data: bytes) -> MarkFile:
        """The mark in ``data``; MarkFileError if it is damaged, absurd or of another format."""
        body = parse_object(data, what="mark file", error=MarkFileError, limit=MAX_MARK_BYTES)
        if body.get("format") != MARK_FORMAT:
            raise MarkFileError(
                "The mark file's format is unknown",
                expected=MARK_FORMAT,
                found=repr(body.get("format"))[:60],
                fix="Use a mark.json that gradmark wrote, or update gradmark",
            )
        checksum = body.pop("checksum", None)
        try:
            intact = checksum == sha256(canonical_json(body))
        except UsageError:  # a number that parses as infinite
            intact = False
        if not intact:
            raise MarkFileError(
                "The mark file was changed or damaged",
                expected="a checksum that fits the content",
                found="another one",
                fix="Take an undamaged copy",
            )
        _check_fields(
            body,
            {"format", "scheme", "parameters", "spec", "test", "carriers", "salt", "commitment", "extra"},
            "mark file",
        )
        try:
            salt = bytes.fromhex(body["salt"])
        except (TypeError, ValueError):
            salt = b""
        return cls(
            scheme=body["scheme"],
            scheme_parameters=body["parameters"],
            spec=spec_from(body["spec"]),
            test=body["test"],
            carriers=body["carriers"],
            salt=salt if salt.hex() == body["salt"] else b"",  # fromhex also takes spaces and capitals
            commitment=body["commitment"],
            extra=body["extra"],
        )

    def save(self, path: str | os.PathLike[str], *, overwrite: bool = False) -> None:
        """Write the file as a whole or not at all; OutputPathError if it can't be."""
        atomic_write(path, self.to_bytes(), overwrite=overwrite)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> MarkFile:
        """The mark in file ``path``; MarkFileError if it can't be read."""
        return cls.from_bytes(read_limited(path, what="mark file", error=MarkFileError, limit=MAX_MARK_BYTES))

    def _reading_fields(self) -> dict[str, Any]:
        return {
            "scheme": self.scheme,
            "parameters": self.scheme_parameters,
            "spec": asdict(self.spec),
            "test": self.test,
            "carriers": self.carriers,
        }


def _require(good: bool, name: str, found: object) -> None:
    if not good:
        raise MarkFileError(
            f"The mark's {name} makes no sense",
            expected="a value as gradmark writes it",
            found=repr(found)[:80],
            fix="Take the mark file that embed wrote",
        )


def _check_fields(body: dict[str, Any], expected: set[str], what: str) -> None:
    if set(body) != expected:
        raise MarkFileError(
            f"The {what} has other fields than it should",
            expected=", ".join(sorted(expected)),
            found=", ".join(sorted(body))[:300] or "none",
            fix="Take the mark file that embed wrote",
        )


def _has_type(value: object, wanted: type) -> bool:
    """isinstance, for values whose annotation nobody has checked yet."""
    return isinstance(value, wanted)


def _is_text(value: object, pattern: re.Pattern[str]) -> bool:
    return isinstance(value, str) and bool(pattern.fullmatch(value))


def _is_int(value: object, low: int, high: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def _is_finite(value: object) -> bool:
    try:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:
        return False


def spec_from(body: object) -> ModelSpec:
    """The spec in a mark file's ``spec`` object, not yet checked for sense."""
    if not isinstance(body, dict):
        raise MarkFileError("The mark's spec makes no sense", expected="an object", found=type(body).__name__)
    _check_fields(body, set(ModelSpec.__dataclass_fields__), "mark file's spec")
    shape = body["input_shape"]
    _require(isinstance(shape, list), "input shape", shape)
    return ModelSpec(**{**body, "input_shape": tuple(shape)})


def checked_spec(spec: ModelSpec) -> ModelSpec:
    """``spec`` with floats as floats, so that equal specs have equal bytes; MarkFileError if absurd."""
    _require(isinstance(spec, ModelSpec), "spec", type(spec).__name__)
    _require(spec.domain in get_args(Domain), "domain", spec.domain)
    shape = spec.input_shape
    _require(_has_type(shape, tuple) and 1 <= len(shape) <= 4, "input shape", shape)
    _require(all(_is_int(size, 1, 2**31) for size in shape), "input shape", shape)
    _require(math.prod(shape) <= 2**31, "input shape", shape)
    _require(_is_int(spec.n_classes, 2, 10**6), "number of classes", spec.n_classes)
    _require(_is_finite(spec.scale) and spec.scale > 0, "scale", spec.scale)
    low, high, levels = spec.low, spec.high, spec.levels
    _require(all(bound is None or _is_finite(bound) for bound in (low, high)), "input range", (low, high))
    _require(low is None or high is None or low < high, "input range", (low, high))
    _require(levels is None or _is_int(levels, 1, 2**32), "levels", levels)
    return ModelSpec(
        spec.domain,
        tuple(int(size) for size in shape),
        spec.n_classes,
        None if low is None else float(low),
        None if high is None else float(high),
        levels,
        float(spec.scale),
    )


__all__ = ["MarkFile", "atomic_write", "canonical_json", "sha256"]
