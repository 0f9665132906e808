"""Hostile files: mutants of every format may be refused by a typed error or accepted, and nothing else.

    python benchmarks/fuzz.py [N [FORMAT ...]]   N mutants (default 100,000) of each format, or of those named;
                                                 writes results/fuzz.json

Half of the mutants have bytes flipped, cut, doubled or spliced; the other half are JSON with values, names
and structure changed, *repaired* afterwards (checksum, signature), so that they get past the outer door.
Whatever a format's reader accepts is used further: a scheme is built, a claim checked. scrypt is replaced by a
cheap stand-in, since a mutant may ask for a second of work. Another format is one line in ``FORMATS``.
"""

from __future__ import annotations

import base64
import hashlib
import json
import platform
import random
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import cryptography
from torch import nn

from gradmark import catalog, keyfile
from gradmark._version import __version__
from gradmark.claim import ClaimFile, Opening, check_claim
from gradmark.claim.file import PAYLOAD_TYPE, PURPOSE
from gradmark.claim.timestamp import load_certificates, read_stamp
from gradmark.codec import MarkFile
from gradmark.dsse import Envelope
from gradmark.errors import GradmarkError
from gradmark.files import sha256
from gradmark.keys import OwnerKey
from gradmark.protocols import ModelSpec
from gradmark.seal import SealFile, check, make_seal
from gradmark.seal.codec import signer_of, signing_key
from gradmark.suspects import ModuleSuspect
from gradmark.trace import open_tracing, read_licensees

GOLDEN = Path(__file__).resolve().parents[1] / "tests" / "golden"
RESULTS = Path(__file__).parent / "results" / "fuzz.json"
PASSPHRASE = "golden"
KEY = OwnerKey.load(GOLDEN / "key-v1.json")
CLAIM = ClaimFile.load(GOLDEN / "claim-v1.json")
CERTIFICATES = load_certificates(GOLDEN / "claim-v1-ca.pem")
BASE = MarkFile.load(GOLDEN / "mark-ensemble-v1.json")
NET = nn.Linear(4, 3)
nn.init.eye_(NET.weight)
nn.init.zeros_(NET.bias)
Body = dict[str, Any]


@dataclass(frozen=True)
class Format:
    """``seeds``: good files. ``read``: all that is done with one. ``repair``: a changed JSON body into a file that
    only a reader who looks closely can refuse; None for what isn't JSON."""

    seeds: tuple[bytes, ...]
    read: Callable[[bytes], object]
    repair: Callable[[Body], bytes] | None = None
    body: Callable[[bytes], Body] = json.loads


def dumps(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def with_checksum(body: Body) -> bytes:
    rest = {name: value for name, value in body.items() if name != "checksum"}
    return dumps({**rest, "checksum": sha256(dumps(rest))}) if "checksum" in body else dumps(body)


def with_signature(body: Body) -> bytes:
    """The statement in a fresh envelope, its mark's checksum right, signed by the owner himself."""
    inner = body.get("predicate")
    if isinstance(inner, dict) and isinstance(inner.get("mark"), dict):
        inner["mark"] = json.loads(with_checksum(inner["mark"]))
        if isinstance(body.get("subject"), list) and body["subject"]:
            digest = sha256(dumps(inner["mark"])).removeprefix("sha256:")
            if isinstance(body["subject"][0], dict):
                body["subject"][0]["digest"] = {"sha256": digest}
    envelope = Envelope.sign(KEY, PURPOSE, PAYLOAD_TYPE, dumps(body))
    return dumps({**envelope.to_json(), "timestamps": []})


def with_key(body: Body) -> bytes:
    if isinstance(body.get("key"), dict):
        body["key"] = json.loads(with_checksum(body["key"]))
    return dumps(body)


def payload(data: bytes) -> Body:
    found: Body = json.loads(base64.b64decode(json.loads(data)["payload"]))
    return found


def read_mark(data: bytes) -> None:
    mark = MarkFile.from_bytes(data)
    catalog.scheme(mark.scheme, mark.scheme_parameters)
    mark.check_key(KEY)


def read_tracing(data: bytes) -> None:
    """As if the owner himself had committed to it."""
    mark = MarkFile.from_bytes(data)
    mark = replace(mark, commitment=KEY.commit(mark.statement(), mark.salt))
    open_tracing(mark, KEY, BASE).codebook.table(["Acme"])


def read_list(ending: str) -> Callable[[bytes], None]:
    """Of licensees: by way of a file, since the name's ending says what it is."""

    def read(data: bytes) -> None:
        with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as folder:
            path = Path(folder, "licensees" + ending)
            path.write_bytes(data)
            read_licensees(path)

    return read


def read_claim(data: bytes) -> None:
    check_claim(ClaimFile.from_bytes(data), key=KEY, trusted=CERTIFICATES, against=CLAIM)


def golden(*names: str) -> tuple[bytes, ...]:
    return tuple((GOLDEN / name).read_bytes() for name in names)


def protected() -> tuple[bytes, ...]:
    """A key file under the cheap stand-in for scrypt, so that mutants of it can be opened."""
    with cheap_scrypt():
        return (KEY.to_bytes(PASSPHRASE),)


def tiny_seals() -> tuple[bytes, ...]:
    """Seals of four weights a class, with probes of both kinds of encoding and without."""
    vector = ModelSpec("vector", (4,), 3)
    asked = ((vector, 2), (replace(vector, low=0.0, high=1.0, levels=255), 2), (vector, 0))
    made = (
        make_seal(NET, KEY, spec, model=sha256(b""), probes=n, candidates=2, salt=bytes(16), created="2026")
        for spec, n in asked
    )
    return tuple(seal.to_bytes() for seal in made)


def with_seal(body: Body) -> bytes:
    """Signed by the owner himself."""
    rest = {name: value for name, value in body.items() if name != "signature"}
    if isinstance(rest.get("signer"), str):
        rest["signer"] = signer_of(KEY)
    content = dumps(rest)
    signature = signing_key(KEY).sign(b"gradmark/v1/seal" + len(content).to_bytes(4, "big") + content)
    return dumps({**rest, "signature": base64.b64encode(signature).decode()})


def read_seal(data: bytes) -> None:
    seal = SealFile.from_bytes(data)
    seal.check_key(KEY)
    seal.limits()
    suspect = ModuleSuspect(NET) if seal.spec.input_shape == (4,) else None
    check(seal, suspect, tensors=NET.state_dict()).to_json()


class Cheap:
    """Stands for scrypt: one hash instead of 128 MiB."""

    def __init__(self, **options: Any) -> None:
        self.salt = options["salt"]

    def derive(self, secret: bytes) -> bytes:
        return hashlib.sha256(self.salt + secret).digest()


@contextmanager
def cheap_scrypt() -> Any:
    before, keyfile.Scrypt = keyfile.Scrypt, Cheap  # type: ignore[misc, assignment]
    try:
        yield
    finally:
        keyfile.Scrypt = before  # type: ignore[misc]


FORMATS: dict[str, Format] = {
    "key": Format(golden("key-v1.json", "key-v1-passphrase.json") + protected(), lambda d: OwnerKey.from_bytes(d, PASSPHRASE), with_checksum),
    "mark": Format(golden("mark-model-v1.json", "mark-ensemble-v1.json"), read_mark, with_checksum),
    "claim": Format(golden("claim-v1.json"), read_claim, with_signature, payload),
    "claim's envelope": Format(golden("claim-v1.json"), read_claim, dumps),
    "opening": Format(golden("opening-v1.json"), lambda d: Opening.from_bytes(d, PASSPHRASE), with_key),
    "seal": Format(tiny_seals(), read_seal, with_seal),
    "tracing mark": Format(golden("trace-v1.json"), read_tracing, with_checksum),
    "licensees, .csv": Format(("name,licensee\r\n1,Acme\r\n2,\"Ünïted, Widgets\"\r\n".encode(), b"Acme\nGlobex\n"), read_list(".csv")),
    "licensees, .json": Format((b'["Acme","Globex","Initech"]',), read_list(".json")),
    "time stamp": Format(CLAIM.stamps, lambda d: read_stamp(d, CLAIM.stamped, CERTIFICATES)),
}  # fmt: skip

HOSTILE: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2**31, 2**63, 2**70, -(2**70), 10**400, 0.0, -0.0, 1e-300, 1e308, float("inf"), float("nan"),
    "", " ", "a", "0", "-1", "é", "\ud800", "\u202e", "\x00", "a" * 5000, "../../etc/passwd", "sha256:" + "0" * 64, "AAAA", "AAA=",
    [], {}, [[]], [None], {"": None}, {"a": {"b": {"c": []}}}, [1] * 300, "9" * 5000,
)  # fmt: skip


def places(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Paths to every value inside of ``value``."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [at, *(path for name, inner in items for path in places(inner, (*at, name)))]


def changed(body: Body, rng: random.Random) -> Body:
    """One to three values replaced, removed, renamed, doubled or nested."""
    body = deepcopy(body)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        paths = [path for path in places(body) if path]
        if not paths:
            break
        *way, last = rng.choice(paths)
        holder: Any = body
        for name in way:
            holder = holder[name]
        change(holder, last, rng)
    return body


def change(holder: Any, last: Any, rng: random.Random) -> None:
    """One value of a dictionary or list."""
    old, kind = holder[last], rng.randrange(8)
    if kind == 0:
        del holder[last]
    elif kind == 1 and isinstance(holder, dict):
        holder[str(rng.choice(HOSTILE))[:40]] = holder.pop(last)
    elif kind == 2 and isinstance(holder, list):
        holder.insert(rng.randrange(len(holder) + 1), deepcopy(old))
    else:
        holder[last] = another(old, kind, rng)


def another(old: Any, kind: int, rng: random.Random) -> Any:
    """A value that was made of the old one, or a hostile one."""
    if kind == 3:
        return {"x": old} if rng.random() < 0.5 else [old]
    if kind == 4 and isinstance(old, str) and old:
        cut = rng.randrange(len(old))
        return old[:cut] + rng.choice(("", "A", "=", "\n", "é", "0")) + old[cut + rng.randrange(2) :]
    if kind == 5 and isinstance(old, int | float):
        return rng.choice((-old, old + 1, old - 1, float(old), str(old)))
    if kind == 6 and rng.random() < 0.01:
        for _ in range(3000):
            old = [old]
        return old
    return deepcopy(rng.choice(HOSTILE))


def broken(data: bytes, others: tuple[bytes, ...], rng: random.Random) -> bytes:
    """Bytes flipped, set, cut out, doubled, put in or taken from another good file."""
    found = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 4, 8))):
        if not found:
            break
        at, kind = rng.randrange(len(found)), rng.randrange(7)
        size = rng.choice((1, 1, 2, 4, 16, 100))
        if kind == 0:
            found[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            found[at] = rng.choice((0, 0x7F, 0xFF, 0x22, 0x7B, 0x5B, 0x2C, 0x30, rng.randrange(256)))
        elif kind == 2:
            del found[at : at + size]
        elif kind == 3:
            found[at:at] = found[at : at + size]
        elif kind == 4:
            found[at:at] = rng.randbytes(size)
        elif kind == 5:
            other = rng.choice(others)
            start = rng.randrange(len(other))
            found[at : at + size] = other[start : start + size]
        elif rng.random() < 0.2:
            del found[at:]
    return bytes(found)


def mutant(form: Format, rng: random.Random) -> bytes:
    seed = rng.choice(form.seeds)
    if form.repair is None or rng.random() < 0.5:
        return broken(seed, form.seeds, rng)
    try:
        return form.repair(changed(form.body(seed), rng))
    except (ValueError, RecursionError, TypeError, OverflowError):  # what can't even be written as JSON
        return broken(seed, form.seeds, rng)


def fuzz(name: str, n: int, seed: int = 0) -> tuple[Counter[str], list[str]]:
    """How ``n`` mutants fared, and the mutants (base64) that raised anything but a typed error."""
    form, rng = FORMATS[name], random.Random(f"{name} {seed}")
    outcomes: Counter[str] = Counter()
    untyped: list[str] = []
    with cheap_scrypt(), warnings.catch_warnings(action="error"):
        for data in form.seeds:
            if name != "key":  # the golden one under a passphrase needs the real scrypt
                form.read(data)
        for _ in range(n):
            data = mutant(form, rng)
            try:
                form.read(data)
                outcomes["accepted"] += 1
            except GradmarkError as error:
                outcomes[type(error).__name__] += 1
            except BaseException as error:  # pyo3's panics are no Exceptions
                if isinstance(error, KeyboardInterrupt):
                    raise
                outcomes[f"UNTYPED {type(error).__name__}"] += 1
                untyped.append(f"{type(error).__name__}: {error} <- {base64.b64encode(data).decode()}")
    return outcomes, untyped


def main() -> None:
    n = int(sys.argv[1]) if len(sys.argv) > 1 else 100_000
    rows = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for name in sys.argv[2:] or FORMATS:
        start = time.process_time()
        outcomes, untyped = fuzz(name, n)
        rows[name] = {
            "mutants": n, "seed": 0, "outcomes": dict(sorted(outcomes.items())), "untyped": len(untyped),
            "cpu_seconds": round(time.process_time() - start, 1),
            "versions": {"gradmark": __version__, "python": platform.python_version(), "cryptography": cryptography.__version__},
        }  # fmt: skip
        print(name, rows[name]["outcomes"], *untyped[:5], sep="\n  ", flush=True)
        RESULTS.write_text(json.dumps(rows, indent=1) + "\n")
    sys.exit(any(row["untyped"] for row in rows.values()))


if __name__ == "__main__":
    main()
