"""Making a seal: the manifest of a model's tensors, and probes that any change of them disturbs."""

from __future__ import annotations

import copy
import secrets
from collections.abc import Callable, Mapping
from datetime import UTC, datetime

import torch
from torch import Tensor, nn

from gradmark._version import __version__
from gradmark.errors import ModelError, UsageError
from gradmark.keys import OwnerKey
from gradmark.protocols import ModelSpec
from gradmark.scores import check_shape, probabilities
from gradmark.seal.answers import Form, logarithms
from gradmark.seal.codec import SealFile, signer_of
from gradmark.seal.manifest import plain_tensors, record
from gradmark.seal.probes import Probes, Ties, complementary, effects, starts, tied
from gradmark.seal.settle import settle
from gradmark.suspects.checks import brief, unwrap
from gradmark.suspects.module import undisturbed

PROBES, ANCHORS, CANDIDATES = 10, 16, 30
_HONEST = 16  # the tolerance in units of the arithmetic noise that was met
_LEAST = 2e-5  # ... and logits that are allowed for in any case, relative to scores of ten
_NOISE = 1e-3  # relative noise on a tensor, by which sensitivity is measured
Report = Callable[[str, int, int], None]
Score = Callable[[Tensor], Tensor]


def make_seal(
    module: nn.Module, key: OwnerKey, spec: ModelSpec, *, model: str, probes: int = PROBES,
    candidates: int = CANDIDATES, natural: Tensor | None = None, salt: bytes | None = None,
    created: str | None = None, report: Report = lambda name, done, total: None,
) -> SealFile:  # fmt: skip
    """The signed seal of ``module``, which stays as it was.

    ``model``: the digest of its file. ``probes``: how many sensitive inputs, 0 for none: such a seal may be
    published. ``candidates``: how many they are picked from. ``natural`` (m, *shape): inputs to start from
    instead of noise. ``salt``: 16 bytes, fresh unless a test gives them. Raises ModelError where the model
    can't be copied, has no gradients, or answers with NaN.
    """
    if not 0 <= probes <= 1000 or candidates < probes:
        raise UsageError(
            "The number of probes makes no sense", expected="0 to 1000, and no more than candidates"
        )
    salt = secrets.token_bytes(16) if salt is None else salt
    seed = key.derive("seal-sketch", 8, context=salt).hex()
    tensors = plain_tensors(module.state_dict())
    if not tensors:
        raise ModelError("The model has no weights to seal", expected="tensors in its state dict")
    public = not probes
    records = tuple(record(name, value, int(seed, 16), public=public) for name, value in tensors.items())
    found = None
    if probes:
        with torch.inference_mode(False), torch.enable_grad(), undisturbed(module):
            found = _probes(module, key, spec, salt, probes, candidates, natural, report)
    created = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ") if created is None else created
    return SealFile(
        key.owner, created, model, spec, salt.hex(), seed, records, found, __version__, signer_of(key)
    ).signed(key)


def _probes(
    module: nn.Module, key: OwnerKey, spec: ModelSpec, salt: bytes, n: int, candidates: int,
    natural: Tensor | None, report: Report,
) -> Probes:  # fmt: skip
    work = _copy(module)
    generator = torch.Generator().manual_seed(int.from_bytes(key.derive("seal-plan", 7, context=salt), "big"))
    x = starts(key, spec, candidates, salt, natural)
    check_shape(spec, x)
    form = _form(work, x, spec)
    score, exact = _logits(work, form), _logits(_double(work), form)
    ties = Ties.draw(candidates, spec.n_classes, generator)
    x = spec.snap(tied(score, x, ties, spec, lambda done, total: report("tie", done, total)))
    shown, labels, share = effects(score, work, x, ties)
    pick = complementary(shown, labels, share, ties.first[:, 0], n)
    x, ties = x[pick], ties.at(pick)
    tolerance = _tolerance(work, exact, x, form)
    x, _ = settle(score, exact, x, ties, spec, 4 * tolerance, 12 * tolerance)
    report("settle", 1, 1)
    anchors = starts(key, spec, ANCHORS, salt + b"anchors", natural)
    tolerance = max(tolerance, _tolerance(work, exact, torch.cat([x, anchors]), form))
    with torch.no_grad():
        scores, others = ((z.softmax(1) if form == "probabilities" else z) for z in map(exact, (x, anchors)))
    sensitivity = _sensitivity(work, form, x, generator, report)
    return Probes(x, scores.double(), anchors, others.double(), form, tolerance, sensitivity)


def _copy(module: nn.Module) -> nn.Module:
    """A float32 copy on the CPU whose parameters take gradients."""
    try:
        work = copy.deepcopy(module).cpu().float()
        for p in work.parameters():
            p.requires_grad_(p.is_floating_point())
    except Exception as cause:  # a user's module may refuse in any way
        raise ModelError("The model can't be copied to look for probes", found=brief(cause)) from cause
    return work


def _double(work: nn.Module) -> nn.Module:
    """The same in double precision, or as it is where it refuses that."""
    try:
        exact = copy.deepcopy(work).double()
    except Exception:  # as above
        return work
    return exact


def _form(work: nn.Module, x: Tensor, spec: ModelSpec) -> Form:
    with torch.no_grad():
        out = unwrap(work(x[:4]))
    if not isinstance(out, Tensor) or out.ndim != 2 or out.shape[1] != spec.n_classes:
        found = str(tuple(out.shape)) if isinstance(out, Tensor) else type(out).__name__
        raise ModelError("The model doesn't fit", expected=f"scores of {spec.n_classes} classes", found=found)
    if not bool(torch.isfinite(out).all()):
        raise ModelError("The model gave scores that aren't finite", expected="finite numbers")
    return "logits" if probabilities(out.float()) is None else "probabilities"


def _logits(module: nn.Module, form: Form) -> Score:
    """Logits of inputs in the module's own precision; logarithms where it answers with probabilities."""
    dtype = next((p.dtype for p in module.parameters() if p.is_floating_point()), torch.float32)

    def score(x: Tensor) -> Tensor:
        out: Tensor = unwrap(module(x.to(dtype)))
        return out.clamp_min(1e-30).log() if form == "probabilities" else out

    return score


def _tolerance(work: nn.Module, exact: Score, x: Tensor, form: Form) -> float:
    """Logits by which other batch sizes and orders of summation may move a score, with room to spare."""
    score = _logits(work, form)
    with torch.no_grad():
        truth = exact(x).double()
        answers = [score(x), torch.cat([score(row[None]) for row in x]), score(x.flip(0)).flip(0)]
        if x.ndim == 4:
            answers.append(score(x.contiguous(memory_format=torch.channels_last)))
    noise = max(float((logarithms(a, "logits") - logarithms(truth, "logits")).abs().max()) for a in answers)
    return max(_HONEST * noise, _LEAST * max(1.0, float(truth.abs().max()) / 10))


def _sensitivity(
    work: nn.Module, form: Form, x: Tensor, generator: torch.Generator, report: Report
) -> dict[str, float]:
    """For each weight tensor, how far centred logits move per unit of relative noise (root mean square)."""
    score = _logits(work, form)
    weights: Mapping[str, nn.Parameter] = {n: p for n, p in work.named_parameters() if p.ndim > 1}
    found = {}
    with torch.no_grad():
        before = logarithms(score(x), "logits")
        for i, (name, p) in enumerate(weights.items()):
            kept, noise = p.clone(), torch.randn(p.shape, generator=generator)
            p.add_(noise * (_NOISE * float(kept.norm()) / max(float(noise.norm()), 1e-30)))
            moved = logarithms(score(x), "logits") - before
            p.copy_(kept)
            found[name] = float(moved.square().mean().sqrt()) / _NOISE
            report("sensitivity", i + 1, len(weights))
    return found


__all__ = ["ANCHORS", "CANDIDATES", "PROBES", "make_seal"]
