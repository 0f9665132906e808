"""Checking a suspect against a seal: intact, modified and how strongly, another model, or undecided."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from gradmark._version import __version__
from gradmark.protocols import Access, BlackBox
from gradmark.seal.answers import Comparison, compared, logarithms
from gradmark.seal.codec import SealFile
from gradmark.seal.manifest import TensorChange, compare, plain_tensors
from gradmark.seal.probes import Probes, detection_limit

SealOutcome = Literal["intact", "modified", "other", "inconclusive"]
RELATED = 0.5
"""Similarity of ordinary answers from which on a model counts as the sealed one, modified, not as another."""


@dataclass(frozen=True)
class Checked:
    """What a check found; ``to_json`` is the public interface of ``gradmark check --json``.

    ``modified``: whether the suspect differs from the sealed model; None if that is undecided. ``form``,
    ``decimals``: how answers came. ``off`` of ``probes`` answers differ. ``strength``: the relative noise on
    every weight that would move the answers as far, or, white-box, the change of all weights relative to
    their norm. ``similarity``: of ordinary answers to the sealed model's, 1 if equal, about 0 for strangers.
    ``limit``: relative noise on any one weight tensor from which on this check sees it. ``tensors``: those
    that differ, None where they weren't at hand. ``own_program``: the suspect's file brings what is done with
    the weights, which was compared at the probes alone.
    """

    outcome: SealOutcome
    modified: bool | None
    access: Access
    reason: str
    seal: str
    signer: str
    owner: str
    suspect: str
    probes: int = 0
    off: int = 0
    queries: int = 0
    form: str | None = None
    decimals: int | None = None
    strength: float | None = None
    similarity: float | None = None
    limit: float | None = None
    n_tensors: int = 0
    tensors: tuple[TensorChange, ...] | None = None
    own_program: bool = False
    seconds: float = 0.0
    version: str = __version__

    def to_json(self) -> dict[str, Any]:
        """A dictionary of JSON values."""
        return asdict(self)


def check(
    seal: SealFile, suspect: BlackBox | None, *, tensors: Mapping[str, Tensor] | None = None,
    digest: str = "", own_program: bool = False,
) -> Checked:  # fmt: skip
    """Say whether ``suspect`` is the sealed model.

    ``tensors``: the suspect's own, for a white-box check; its probes are asked all the same if it can
    answer, for equal weights in another program aren't an equal model. ``digest`` names what has weights
    alone. ``own_program``: the suspect's program came with its file and isn't the owner's code. Raises
    ModelError or EndpointError where the suspect fails.
    """
    start = time.perf_counter()
    name = suspect.digest if suspect is not None else digest
    access: Access = "black" if tensors is None else "white"
    found = Checked("inconclusive", None, access, "", seal.digest, seal.signer, seal.owner, name)
    found = replace(found, own_program=own_program and access == "white")
    if suspect is not None and seal.probes is not None:
        found = _asked(found, seal.probes, suspect)
    elif tensors is None:
        found = replace(
            found, reason="the seal has no probes: only a model whose weights are at hand can be checked"
        )
    if tensors is not None:
        found = _opened(found, seal, tensors)
    return replace(found, seconds=round(time.perf_counter() - start, 3))


def _opened(found: Checked, seal: SealFile, tensors: Mapping[str, Tensor]) -> Checked:
    """What the tensors say, beside what the answers said."""
    records = {r.name: r for r in seal.tensors}
    changes = tuple(compare(records, plain_tensors(tensors), int(seal.seed, 16)))
    found = replace(found, tensors=changes, n_tensors=len(records))
    if not changes:
        if found.off:
            reason = f"all {len(records)} tensors are the sealed ones, but the model computes something else"
            return replace(found, outcome="modified", modified=True, reason=f"{reason}: {found.reason}")
        told = "" if found.queries else "; no answers were compared"
        if found.queries and found.own_program:
            told = f", and the file's own program answers all {found.probes} probes as sealed"
        return replace(found, outcome="intact", modified=False,
                       reason=f"all {len(records)} tensors are the sealed ones{told}")  # fmt: skip
    total = sum(r.norm**2 for r in records.values())
    fitting = [c for c in changes if c.relative_l2 is not None and c.name in records]
    moved = sum(((c.relative_l2 or 0.0) * records[c.name].norm) ** 2 for c in fitting)
    strength = (moved / max(total, 1e-300)) ** 0.5 if fitting else None
    reason = f"{len(changes)} of {len(records)} tensors differ"
    if found.queries:
        other = found.similarity is not None and found.similarity < RELATED
        reason += "" if found.off else ", though every probe is answered as sealed"
    else:  # independent networks are about as far apart as their weights are large, and more
        other = strength > 1.0 if strength is not None else 2 * len(changes) > len(records)
    outcome: SealOutcome = "other" if other else "modified"
    return replace(found, outcome=outcome, modified=True, strength=strength, reason=reason)


def _asked(found: Checked, probes: Probes, suspect: BlackBox) -> Checked:
    """What the answers say; a suspect that is off is asked again, and then for ordinary inputs."""
    answers = suspect.query(probes.x)
    n, classes = probes.scores.shape
    found = replace(found, probes=n, queries=n)
    if answers.shape[1] != classes:
        reason = f"it tells {answers.shape[1]} classes apart, the sealed model {classes}"
        return replace(found, outcome="other", modified=True, off=n, reason=reason)
    first = compared(probes.scores, probes.form, answers, probes.tolerance)
    off = int(first.off.sum())
    found = replace(
        found,
        off=off,
        form=first.form,
        decimals=first.decimals,
        limit=detection_limit(probes, first.form, first.decimals),
    )
    if not off and first.blank:
        return replace(
            found, reason=f"{first.blank} of {n} probes were answered without a score of any class"
        )
    if not off:
        return replace(
            found, outcome="intact", modified=False, reason=f"all {n} probes are answered as sealed"
        )
    again = suspect.query(probes.x[first.off])
    wanders = not torch.allclose(again, answers[first.off], rtol=0, atol=4 * probes.tolerance)
    others = suspect.query(probes.anchors)
    queries = n + off + len(others)
    similarity = similar(probes, others, first)
    strength = None if first.moved is None else first.moved / max(_all_at_once(probes), 1e-30)
    found = replace(found, queries=queries, similarity=similarity, strength=strength)
    if similarity < RELATED:
        reason = (
            f"{off} of {n} probes are off, and ordinary answers resemble the sealed ones by {similarity:.2f}"
        )
        return replace(found, outcome="other", modified=True, reason=f"{reason} only")
    if wanders:
        reason = "an input was answered differently when it was asked again: noise hides what the probes say"
        return replace(found, reason=reason)
    return replace(found, outcome="modified", modified=True, reason=f"{off} of {n} probes are off")


def similar(probes: Probes, answers: Tensor, seen: Comparison) -> float:
    """Likeness of ordinary answers: correlation of the logits freed of what inputs and classes share.

    For labels: Cohen's kappa.
    """
    sealed = probes.anchor_scores
    if seen.form == "labels":
        a, b = sealed.argmax(1), answers.argmax(1)
        classes = sealed.shape[1]
        chance = float((torch.bincount(a, minlength=classes) * torch.bincount(b, minlength=classes)).sum())
        chance /= len(a) ** 2
        return (float((a == b).double().mean()) - chance) / max(1 - chance, 1e-9)
    form = "probabilities" if seen.form == "probabilities" else "logits"
    floor = 0.5 * 10.0 ** -(seen.decimals or 9) if form == "probabilities" else None
    before = sealed if probes.form == form else sealed.softmax(1)
    rows = [before.double(), answers.double()]
    a, b = (logarithms(r if floor is None else r.clamp_min(floor), form) for r in rows)  # type: ignore[arg-type]
    a, b = a - a.mean(0), b - b.mean(0)
    return float((a * b).sum() / (a.norm() * b.norm()).clamp_min(1e-12))


def _all_at_once(probes: Probes) -> float:
    """How far centred logits move per unit of relative noise on every weight tensor."""
    return float(sum(v**2 for v in probes.sensitivity.values()) ** 0.5)


__all__ = ["RELATED", "Checked", "SealOutcome", "check", "similar"]
