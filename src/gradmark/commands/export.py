"""``gradmark embed --export-triggers``: a mark as a few more inputs, for trainers that can't be hooked."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gradmark import catalog
from gradmark._version import __version__
from gradmark.codec import MarkFile
from gradmark.commands.job import CARRIERS, TEST
from gradmark.data import load_data
from gradmark.errors import OutputPathError
from gradmark.keys import OwnerKey
from gradmark.triggers import triggers_of


@dataclass(frozen=True)
class ExportJob:
    """``triggers``: the ``.npz`` to write; ``out``: a new folder for mark.json; ``data``: for the spec."""

    data: str
    key: OwnerKey
    out: Path
    triggers: Path
    scheme: str = "trigger"
    bits: int | None = None
    options: tuple[tuple[str, Any], ...] = ()


@dataclass(frozen=True)
class Exported:
    """What was written. ``share``: triggers in a hundred training inputs, each once."""

    mark: Path
    triggers: Path
    n: int
    share: float

    def to_json(self) -> dict[str, Any]:
        return {"mark": str(self.mark), "triggers": str(self.triggers), "n": self.n,
                "share": round(self.share, 4), "version": __version__}  # fmt: skip

    def shown(self) -> list[str]:
        times = max(1, round(12.5 / max(self.share, 1e-9)))
        return [
            f"{self.n} secret inputs and their labels in {self.triggers}; the mark in {self.mark}.",
            f"Mix them into the training data, each about {times} times an epoch (an eighth of the inputs).",
            "Spare them augmentations that change them much. Then gradmark verify finds the mark.",
            "The file is secret: whoever has it can train the mark away.",
        ]


def run_export(job: ExportJob) -> Exported:
    """Write both files or none. Raises UsageError for schemes that aren't made of triggers."""
    for path in (job.out, job.triggers):
        if path.exists():
            raise OutputPathError("The output exists already", expected="a new path", found=str(path))
    data = load_data(job.data)
    bits = {} if job.bits is None else {"bits": job.bits}
    scheme = catalog.scheme(job.scheme, {**dict(job.options), **bits})
    found = triggers_of(scheme, job.key, data.spec)
    mark = MarkFile.create(job.key, scheme.name, scheme.parameters(), data.spec, TEST, CARRIERS)
    try:
        job.out.mkdir(parents=True)
    except OSError as cause:
        raise OutputPathError(
            "The output folder can't be made", found=f"{cause.strerror}: {job.out}"
        ) from cause
    try:
        mark.save(job.out / "mark.json")
        found.save(job.triggers)
    except BaseException:
        shutil.rmtree(job.out, ignore_errors=True)
        raise
    inputs = len(data.train) if data.train is not None else len(data.test)
    return Exported(job.out / "mark.json", job.triggers, len(found.labels), 100 * len(found.labels) / inputs)
