"""``gradmark license``: copies of one marked model, each with a licensee's own bits."""

from __future__ import annotations

import copy
import hashlib
import json
import math
import re
import shutil
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from torch import nn

from gradmark.codec import MarkFile, atomic_write
from gradmark.commands.embed import versions
from gradmark.commands.job import SMOOTHING, EmbedJob, fitting
from gradmark.commands.progress import Bar
from gradmark.data import Data
from gradmark.embed import Recipe, accuracy_of, train
from gradmark.errors import MismatchError, OutputPathError, UsageError
from gradmark.keys import OwnerKey
from gradmark.stats import wilson_interval
from gradmark.suspects import ModuleSuspect, file_digest, save_weights, weights_digest
from gradmark.trace import Tracing, copying, create, default_probes, open_tracing, trace
from gradmark.trace.copying import ANCHOR, STRENGTH
from gradmark.verify import DEFAULT_ALPHA, verify

EPOCHS, RATE = 5, 1e-3
MANY = 100_000
"""A copy counts as traceable if its licensee would be named among so many."""
_PLAIN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


@dataclass(frozen=True)
class LicenseJob:
    """Copies for ``licensees`` of the model that carries ``mark``; None stands for a default.

    ``weights``: the marked model, by default the model.safetensors beside ``mark``. ``options``: of the
    tracing mark's probes, where it is made now.
    """

    mark: Path
    model: str
    data: str
    key: OwnerKey
    licensees: tuple[str, ...]
    out: Path
    weights: Path | None = None
    options: tuple[tuple[str, Any], ...] = ()
    epochs: int | None = None
    lr: float | None = None
    batch_size: int | None = None
    optimizer: str | None = None
    augment: str | None = None
    smoothing: float = SMOOTHING
    strength: float = STRENGTH
    anchor: float = ANCHOR
    seed: int = 0

    def __post_init__(self) -> None:
        if self.strength <= 0 or self.anchor < 0:
            raise UsageError(
                "The copies' settings make no sense",
                expected="strength > 0, anchor >= 0",
                found=f"strength={self.strength}, anchor={self.anchor}",
            )

    @property
    def base(self) -> Path:
        return self.weights or self.mark.parent / "model.safetensors"

    @property
    def tracing(self) -> Path:
        """Where the tracing mark lies: beside the base's mark."""
        return self.mark.parent / "trace.json"

    def as_embedding(self) -> EmbedJob:
        """The same model, data and recipe, as embedding takes them."""
        return EmbedJob(
            self.model, self.data, self.key, self.out, self.base,
            epochs=self.epochs or EPOCHS, lr=self.lr or RATE,
            batch_size=self.batch_size, optimizer=self.optimizer, augment=self.augment, seed=self.seed,
        )  # fmt: skip


@dataclass(frozen=True)
class Licensed:
    """What was made: a row for each licensee, and where the tracing mark lies."""

    copies: tuple[dict[str, Any], ...]
    tracing: Path
    base_accuracy: tuple[float, int]

    @property
    def sound(self) -> bool:
        """Whether each copy can be traced among many, and still carries the base mark."""
        return all(row["traceable"] and row["owned"] for row in self.copies)

    def to_json(self) -> dict[str, Any]:
        right, n = self.base_accuracy
        return {
            "outcome": "issued" if self.sound else "inconclusive",
            "trace": str(self.tracing),
            "base_accuracy": [right / n, *wilson_interval(int(right), n)],
            "copies": list(self.copies),
        }


def run_license(job: LicenseJob, console: Console) -> Licensed:
    """Make what isn't there yet; a copy that was finished before stays as it is.

    A copy is built aside and put in its place whole, so that an interrupted run leaves no half of one.
    """
    base_mark = MarkFile.load(job.mark)
    base_mark.check_key(job.key)
    embedding = job.as_embedding()
    recipe = replace(embedding.recipe(), smoothing=job.smoothing)
    data, base = fitting(embedding)
    base.eval()
    with Bar(console) as bar:
        mark = _tracing_mark(job, base_mark, base, data)
        opened = open_tracing(mark, job.key, base_mark)
        _folder(job.out)
        rows = []
        for number, licensee in enumerate(job.licensees):
            place = job.out / slug(licensee)
            row = _finished(place, licensee, mark)
            if row is None:
                seeded = replace(recipe, seed=_seed(job.seed, licensee))
                row = _copy(job, licensee, place, seeded, data, base, (mark, base_mark, opened), bar)
            rows.append(row)
            bar.move("copies", number + 1, len(job.licensees))
    return Licensed(tuple(rows), job.tracing, accuracy_of(base, data.test))


def slug(licensee: str) -> str:
    """A folder's name for any licensee: the plain name, or what is left of it and a short hash."""
    if _PLAIN.fullmatch(licensee) and not licensee.endswith("."):
        return licensee
    left = re.sub(r"[^A-Za-z0-9]+", "-", licensee).strip("-")[:40] or "licensee"
    return f"{left}-{hashlib.sha256(licensee.encode()).hexdigest()[:8]}"


def _tracing_mark(job: LicenseJob, base_mark: MarkFile, base: nn.Module, data: Data) -> MarkFile:
    """The tracing mark of this base: read if it is there, else made from the base's readings."""
    digest = weights_digest(base)
    if not job.tracing.exists():
        if verify(base_mark, job.key, ModuleSuspect(base), data.test.all()).outcome != "owned":
            raise MismatchError(
                "The model to copy doesn't carry the mark",
                expected=f"the model that {job.mark.name} was embedded in",
                found=job.base.name,
                fix="Name the marked model with --weights",
            )
        probes = default_probes(base_mark.spec, dict(job.options))
        create(base_mark, job.key, probes, ModuleSuspect(base), data.test.all(), digest).save(job.tracing)
    elif job.options:
        raise UsageError("The tracing mark is there already: --set comes too late", found=str(job.tracing))
    mark = MarkFile.load(job.tracing)
    if mark.extra.get("weights") != digest:
        raise MismatchError(
            "The copies that went before were made from another model",
            expected=f"weights {str(mark.extra.get('weights'))[:19]}, as {job.tracing.name} says",
            found=digest[:19],
            fix="Make all copies from one and the same marked model",
        )
    return mark


def _copy(
    job: LicenseJob,
    licensee: str,
    place: Path,
    recipe: Recipe,
    data: Data,
    base: nn.Module,
    marks: tuple[MarkFile, MarkFile, Tracing],
    bar: Bar,
) -> dict[str, Any]:
    """Fine-tune one copy, prove both marks in it, write it down."""
    mark, base_mark, opened = marks
    start = time.perf_counter()
    model = copy.deepcopy(base)
    rider = copying(
        opened, licensee, base, anchor=job.anchor, strength=job.strength, seed=_seed(job.seed, licensee)
    )
    train(model, data.to_train(), recipe, marker=rider, stage="copy", report=bar.train)
    right, n = accuracy_of(model, data.test)
    suspect, pool = ModuleSuspect(model), data.test.all()
    own = trace(mark, base_mark, job.key, suspect, pool, [licensee]).log10_p
    verdict = verify(base_mark, job.key, suspect, pool)
    row = {
        "licensee": licensee,
        "folder": str(place),
        "accuracy": [right / n, *wilson_interval(right, n)],
        "log10_p": round(own, 3),
        "traceable": own <= math.log10(DEFAULT_ALPHA / MANY),
        "owned": verdict.outcome == "owned",
        "base_log10_p": verdict.log10_p,
    }
    run = {
        **row,
        "trace": mark.digest,
        "mark": base_mark.digest,
        "owner": job.key.owner,
        "key_id": job.key.key_id,
        "recipe": asdict(recipe),
        "strength": job.strength,
        "anchor": job.anchor,
        "seconds": round(time.perf_counter() - start, 3),
        "versions": versions(),
    }
    _place(model, run, place)
    return row


def _place(model: nn.Module, run: dict[str, Any], place: Path) -> None:
    """Both files of a copy, in a folder that appears when it is complete."""
    aside = place.with_name(f".{place.name}.part")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    try:
        save_weights(model, aside / "model.safetensors")
        run = {**run, "file": file_digest(aside / "model.safetensors")}
        text = json.dumps(run, indent=1, allow_nan=False) + "\n"
        atomic_write(aside / "run.json", text.encode(), mode=0o600)
        aside.rename(place)
    except OSError as cause:
        raise OutputPathError("The copy can't be written", found=f"{cause.strerror}: {place}") from cause
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _finished(place: Path, licensee: str, mark: MarkFile) -> dict[str, Any] | None:
    """The row of a copy that was made before; OutputPathError where something else lies there."""
    if not place.exists():
        return None
    try:
        run = json.loads((place / "run.json").read_text())
        if run["licensee"] == licensee and run["trace"] == mark.digest:
            names = ("licensee", "folder", "accuracy", "log10_p", "traceable", "owned", "base_log10_p")
            return {name: run[name] for name in names}
    except (OSError, ValueError, KeyError, TypeError):
        pass
    raise OutputPathError(
        "Something else lies where the copy should go",
        expected=f"nothing, or {licensee}'s copy under this tracing mark",
        found=str(place),
        fix="Name another --out, or move it away",
    )


def _folder(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as cause:
        raise OutputPathError("The output folder can't be made", found=f"{cause.strerror}: {out}") from cause


def _seed(seed: int, licensee: str) -> int:
    """Each copy sees its data in an order of its own."""
    return (seed + int.from_bytes(hashlib.sha256(licensee.encode()).digest()[:4])) % 2**31


def licensed(done: Licensed) -> list[Table | str]:
    """What a terminal shows."""
    table = Table("Licensee", "Accuracy", "own log10 p", "base log10 p", "", title_justify="left")
    for row in done.copies:
        fine = row["traceable"] and row["owned"]
        told = "" if fine else "TOO WEAK"
        table.add_row(
            row["licensee"], f"{100 * row['accuracy'][0]:.2f}%", f"{row['log10_p']:.1f}",
            f"{row['base_log10_p']:.1f}", told,
        )  # fmt: skip
    right, n = done.base_accuracy
    lines: list[Table | str] = [table, f"The model they were made from: {100 * right / n:.2f}%."]
    if not done.sound:
        lines.append("For a stronger mark: more --epochs, a larger --strength, or a smaller --anchor.")
    return [*lines, f"Tracing mark: {done.tracing}. Keep it with the key and the list of licensees."]


__all__ = ["LicenseJob", "Licensed", "licensed", "run_license", "slug"]
