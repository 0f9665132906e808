"""``gradmark seal``, ``gradmark check``: from what a user names to a seal, or to what it says."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from torch import Tensor, nn

from gradmark.codec import MarkFile
from gradmark.commands.progress import Bar
from gradmark.commands.verify import Endpoint, need_for_reports
from gradmark.data import load_data
from gradmark.errors import ModelFileError, UsageError
from gradmark.keys import OwnerKey
from gradmark.protocols import Access, BlackBox, Domain, ModelSpec
from gradmark.report import check_report, write_report
from gradmark.seal import Checked, SealFile, check_suspect, make_seal
from gradmark.suspects import HttpSuspect, ModuleSuspect, open_suspect, public_name
from gradmark.suspects.apis import find_api
from gradmark.suspects.weights import read_weights

_DOMAINS: dict[int, Domain] = {1: "vector", 2: "signal", 3: "image"}


@dataclass(frozen=True)
class SealJob:
    """Which model to seal with which key; ``data``, ``mark`` or ``shape`` tell what inputs are legal."""

    subject: str
    key: OwnerKey
    out: Path
    model: str | None = None
    data: str | None = None
    mark: Path | None = None
    shape: str | None = None
    probes: int = 10

    def __post_init__(self) -> None:
        if sum(given is not None for given in (self.data, self.mark, self.shape)) > 1:
            raise UsageError(
                "What inputs are legal was said twice", expected="one of --data, --mark and --shape"
            )
        if self.out.exists():
            raise UsageError("A seal is never overwritten", found=str(self.out), fix="Choose another path")


@dataclass(frozen=True)
class CheckJob:
    """Which suspect to check against which seal; ``key``: only a seal of this owner counts."""

    suspect: str
    seal: Path
    model: str | None = None
    access: Access | None = None
    key: OwnerKey | None = None
    report: Path | None = None
    endpoint: Endpoint = field(default_factory=Endpoint)

    def __post_init__(self) -> None:
        if self.access not in (None, "white", "black"):
            raise UsageError("No such access", expected="white or black", found=repr(self.access))
        if self.report is not None:
            suffix = self.report.suffix.lower()
            if suffix not in (".html", ".pdf") or not self.report.resolve().parent.is_dir():
                raise UsageError(
                    "The report can't be written there", expected="*.html or *.pdf in a folder that exists"
                )
            need_for_reports(pdf=suffix == ".pdf")


def run_seal(job: SealJob, console: Console) -> SealFile:
    """Make the seal and write ``job.out``. Progress goes to ``console``."""
    suspect = open_suspect(job.subject, model=job.model)
    if not isinstance(suspect, ModuleSuspect):
        raise UsageError(
            "A seal needs a model with its weights and gradients", expected="a .pt2 or .safetensors file",
            found=job.subject, fix="Seal the model that this one was exported from; the check takes it then",
        )  # fmt: skip
    spec, natural = _spec(job, suspect)
    with Bar(console) as bar:
        seal = make_seal(
            suspect.module, job.key, spec, model=suspect.digest, probes=job.probes,
            candidates=max(30, 3 * job.probes), natural=natural, report=bar.move,
        )  # fmt: skip
    seal.save(job.out)
    return seal


def sealed_json(seal: SealFile, out: Path) -> dict[str, Any]:
    """The public interface of ``gradmark seal --json``."""
    return {
        "seal": str(out), "digest": seal.digest, "signer": seal.signer, "owner": seal.owner,
        "created": seal.created, "model": seal.model, "tensors": len(seal.tensors),
        "entries": sum(math.prod(r.shape) for r in seal.tensors),
        "probes": 0 if seal.probes is None else len(seal.probes.x), "limits": seal.limits(),
        "public": seal.probes is None, "version": seal.version,
    }  # fmt: skip


def run_check(job: CheckJob, console: Console) -> Checked:
    """What the seal says of the suspect; writes ``job.report`` if one is wanted."""
    seal = SealFile.load(job.seal)
    if job.key is not None:
        seal.check_key(job.key)
    suspect, tensors = _opened(job)
    try:
        with Bar(console):
            found = check_suspect(seal, suspect, job.access, tensors, job.suspect)
    finally:
        if isinstance(suspect, HttpSuspect):
            suspect.close()
    if job.report is not None:
        name = public_name(job.suspect)
        write_report(check_report(found, name if "://" in name else Path(name).name or name), job.report)
    return found


def _opened(job: CheckJob) -> tuple[BlackBox | None, dict[str, Tensor] | None]:
    """The suspect, and the tensors of a file of weights, which may lack an architecture or not fit it."""
    if job.suspect.startswith(("http://", "https://")):
        e = job.endpoint
        return HttpSuspect(
            job.suspect,
            api=find_api(e.api),
            batch_size=e.batch_size,
            timeout=e.timeout,
            headers=dict(e.headers),
        ), None
    if Path(job.suspect).suffix.lower() != ".safetensors":
        return open_suspect(job.suspect, model=job.model), None
    tensors = read_weights(job.suspect)
    if job.model is None:
        return None, tensors
    try:
        return open_suspect(job.suspect, model=job.model), tensors
    except ModelFileError:
        if job.access == "black":
            raise
        return None, tensors


def _spec(job: SealJob, suspect: ModuleSuspect) -> tuple[ModelSpec, Tensor | None]:
    """What inputs are legal, and natural ones to start from where they were given."""
    natural = None
    if job.data is not None:
        data = load_data(job.data)
        spec, natural = data.spec, data.test.batch(slice(0, 2000))[0]
    elif job.mark is not None:
        spec = MarkFile.load(job.mark).spec
    else:
        spec = _plain_spec(_shape(job, suspect.module))
    import torch

    middle = 0.0 if spec.low is None or spec.high is None else (spec.low + spec.high) / 2
    width = suspect.query(torch.full((2, *spec.input_shape), middle)).shape[1]
    return replace(spec, n_classes=width), natural


def _plain_spec(shape: tuple[int, ...]) -> ModelSpec:
    """Images of 8 bits in [0, 1], signals of 16 in [-1, 1], vectors as they are."""
    domain = _DOMAINS.get(len(shape), "vector")
    if domain == "image":
        return ModelSpec(domain, shape, 2, 0.0, 1.0, 255)
    return (
        ModelSpec(domain, shape, 2, -1.0, 32767 / 32768, 65535)
        if domain == "signal"
        else ModelSpec(domain, shape, 2)
    )


def _shape(job: SealJob, module: nn.Module) -> tuple[int, ...]:
    if job.shape is not None:
        try:
            shape = tuple(int(n) for n in job.shape.split(","))
        except ValueError:
            shape = (0,)
        if min(shape) < 1:
            raise UsageError("The shape makes no sense", expected="whole numbers as 3,32,32", found=job.shape)
        return shape
    for node in getattr(getattr(module, "graph", None), "nodes", ()):
        value = node.meta.get("val") if node.op == "placeholder" else None
        sizes = list(getattr(value, "shape", ()))[1:]
        if sizes and all(isinstance(n, int) for n in sizes):
            return tuple(sizes)
    raise UsageError(
        "What inputs does the model take?", expected="--data DATA, --mark mark.json or --shape 3,32,32",
        fix="--data is best: it also tells the inputs' range",
    )  # fmt: skip


__all__ = ["CheckJob", "SealJob", "run_check", "run_seal", "sealed_json"]
