"""``gradmark claim``: make a claim, date it, check one offline, or open one to a judge."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from gradmark._version import __version__
from gradmark.claim import (
    ALPHA,
    Checked,
    Claim,
    ClaimFile,
    FixedPool,
    ModelFile,
    Opening,
    check_claim,
    pool_digest,
)
from gradmark.claim.statement import QUERIES
from gradmark.claim.timestamp import Stamp, client, load_certificates, read_stamp, request_stamp
from gradmark.codec import MarkFile
from gradmark.data import load_data
from gradmark.errors import ModelFileError, OutputPathError, UsageError
from gradmark.keys import OwnerKey

_SIGNS = {True: "passed", False: "FAILED", None: "unknown"}


@dataclass(frozen=True)
class ClaimJob:
    """What is claimed: ``mark``'s model, in ``model`` if a file is named; ``data``: the pool to fix."""

    key: OwnerKey
    mark: Path
    out: Path
    model: Path | None = None
    data: str | None = None
    alpha: float = ALPHA
    queries: int = QUERIES
    timestamps: tuple[str, ...] = ()


@dataclass(frozen=True)
class Claimed:
    """A claim that was written to ``path``, with what its time stamps say."""

    path: Path
    file: ClaimFile
    stamps: tuple[Stamp, ...]

    def to_json(self) -> dict[str, Any]:
        claim = self.file.claim
        return {
            "path": str(self.path), "claim": self.file.digest, "owner": claim.owner,
            "signer": self.file.signer,
            "mark": claim.mark.digest,
            "model": None if claim.model is None else claim.model.digest, "alpha": claim.rule.alpha,
            "pool": None if claim.rule.pool is None else claim.rule.pool.digest, "made": claim.made,
            "timestamps": [s.time.strftime("%Y-%m-%dT%H:%M:%SZ") for s in self.stamps],
            "version": __version__,
        }  # fmt: skip

    def shown(self) -> list[str]:
        claim, lines = self.file.claim, []
        lines.append(
            f"Claim of {claim.owner} to {claim.mark.digest[:19]} in {self.path}. It holds no secret."
        )
        lines.append(f"Signed by {self.file.signer}, as all claims of this key: publish that as yours.")
        for stamp in self.stamps:
            lines.append(f"Stamped by {stamp.authority} at {stamp.time:%Y-%m-%d %H:%M:%S} UTC.")
        if not self.stamps:
            lines.append("No time stamp: nothing shows when it was made. Add one (--stamp) before release.")
        if claim.model is None:
            lines.append("It names no model file (--model FILE).")
        if claim.rule.pool is None:
            lines.append("It fixes no inputs (--data): a judge will have to choose them himself.")
        return lines


def make_claim(job: ClaimJob) -> Claimed:
    """Write the claim to ``job.out``. Nothing is written where an authority can't be had."""
    _new(job.out)
    mark = MarkFile.load(job.mark)
    mark.check_key(job.key)
    model = None if job.model is None else ModelFile(job.model.name, file_digest(job.model))
    pool = None
    if job.data is not None:
        batch = load_data(job.data).test.all()
        pool = FixedPool(Path(job.data).name, pool_digest(batch), len(batch[0]))
    claim = Claim.create(job.key, mark, model=model, pool=pool, alpha=job.alpha, queries=job.queries)
    return _stamped(ClaimFile.sign(job.key, claim), job.timestamps, job.out)


def stamp_claim(path: Path, timestamps: tuple[str, ...], out: Path) -> Claimed:
    """The claim in ``path`` with further time stamps, written to ``out``."""
    if not timestamps:
        raise UsageError("Who shall stamp the claim?", expected="--timestamp URL")
    _new(out)
    return _stamped(ClaimFile.load(path), timestamps, out)


def _stamped(file: ClaimFile, urls: tuple[str, ...], out: Path) -> Claimed:
    if urls:
        client()  # says what is missing before anybody is asked
    for url in urls:
        file = file.with_stamp(request_stamp(url, file.stamped))
    file.save(out)
    stamps = tuple(read_stamp(data, file.stamped) for data in file.stamps)
    return Claimed(out, file, stamps)


@dataclass(frozen=True)
class CheckJob:
    """A claim, and whatever there is to check it against."""

    claim: Path
    key: OwnerKey | None = None
    mark: Path | None = None
    model: Path | None = None
    certificates: Path | None = None
    against: Path | None = None


def run_check(job: CheckJob) -> Checked:
    """Look at the claim offline."""
    return check_claim(
        ClaimFile.load(job.claim),
        key=job.key,
        mark=None if job.mark is None else MarkFile.load(job.mark),
        model=None if job.model is None else file_digest(job.model),
        trusted=None if job.certificates is None else load_certificates(job.certificates),
        against=None if job.against is None else ClaimFile.load(job.against),
    )


def checked(found: Checked) -> list[Table | str]:
    """For people: each check in a row, then what it comes to."""
    claim = found.file.claim
    table = Table("Check", "", "Found", title_justify="left")
    for check in found.checks:
        table.add_row(check.name, _SIGNS[check.ok], check.found)
    since = (
        f"It existed on {found.attested:%Y-%m-%d at %H:%M:%S} UTC."
        if found.attested is not None
        else "Nothing that was given shows when it was made."
    )
    word = "VALID" if found.valid else "INVALID"
    return [
        table,
        f"{word}: {claim.owner} claims the mark {claim.mark.digest[:19]} ({claim.mark.scheme}). {since}",
        "It says who committed to which mark. Whether a model carries it, gradmark judge says.",
    ]


@dataclass(frozen=True)
class Disclosed:
    """An opening that was written."""

    path: Path
    claim: str
    owner: str
    protected: bool

    def to_json(self) -> dict[str, Any]:
        return {"path": str(self.path), "claim": self.claim, "owner": self.owner, "protected": self.protected,
                "version": __version__}  # fmt: skip

    def shown(self) -> list[str]:
        how = "protected by the judge's passphrase" if self.protected else "NOT protected"
        return [
            f"Opening of claim {self.claim[:19]} in {self.path}, {how}. It holds the key of {self.owner}.",
            "Whoever opens it can read, and remove, every mark of this key: for the judge's eyes alone.",
        ]


def disclose(path: Path, key: OwnerKey, out: Path, passphrase: str | None) -> Disclosed:
    """Write the opening of the claim in ``path``. MismatchError where ``key`` isn't the claim's."""
    _new(out)
    file = ClaimFile.load(path)
    Opening.of(file, key).save(out, passphrase)
    return Disclosed(out, file.digest, key.owner, passphrase is not None)


def file_digest(path: Path) -> str:
    """``sha256:`` of a file's bytes, as ``sha256sum`` has it. ModelFileError where it can't be read."""
    try:
        with path.open("rb") as file:
            return f"sha256:{hashlib.file_digest(file, 'sha256').hexdigest()}"
    except OSError as cause:
        raise ModelFileError(
            "The model's file can't be read", expected="a file", found=f"{cause.strerror}: {path}"
        ) from cause


def _new(out: Path) -> None:
    """OutputPathError, before anything is asked for or signed, where ``out`` exists."""
    if out.exists():
        raise OutputPathError("The output can't be written", expected="a new path", found=str(out))
