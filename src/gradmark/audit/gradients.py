"""Where the mark lives: input gradients, looked at by one who knows the scheme's family but no key.

Along many directions of throwaway keys, how do the wrong classes' scores respond, and how much of
that is the same at every input? Labels leave that room free, so a mark shows there first: as energy
common to all inputs, as a few large singular values of the mean response, as a mean gradient.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from gradmark.audit.measure import Detector, resampling, side_by_side
from gradmark.carriers import keyed_directions
from gradmark.keys import OwnerKey
from gradmark.protocols import Batch, ModelSpec, Scheme, WhiteBox
from gradmark.scores import probabilities

FIRST_KEY = 900_000_000  # throwaway keys: seeds from here on are embedded nowhere
PART = "gradients"
Family = Callable[[Tensor, Tensor], Tensor]
"""From inputs (b, *shape) and labels (b,) to directions (b, K, *shape)."""
_SCORES = 16  # combinations of scores looked at, at most
_PIXELS = 4096  # coordinates of the gradient kept, at most
_CHUNK = 32
# Some four standard deviations of a difference between unmarked networks of one recipe: small
# convolutional networks on digits and on smooth templates, four or five of each. Conventions, no error rates.
TOLERANCE = {
    "response size": 0.2,
    "response kurtosis": 0.2,
    "common share": 0.3,
    "largest singular value": 0.4,
    "largest singular value within classes": 0.3,
    "flatness of the spectrum": 0.8,
    "mean gradient": 0.2,
    "mean gradient's share": 0.15,
    "readings under strange keys": 0.2,
    "kurtosis under strange keys": 0.4,
}


@dataclass(frozen=True)
class Responses:
    """``values`` (n, q, M): q centred combinations of wrong classes' scores along M directions, in logits;
    ``gradients`` (n, q, P): their input gradients, at no more than some thousand coordinates."""

    values: Tensor
    gradients: Tensor
    labels: Tensor


def without_secrets(scheme: Scheme) -> Scheme:
    """The scheme as a stranger knows it: reference readings, sealed with the owner's key, are left out."""
    given: Any = scheme
    if getattr(given, "reference", ""):
        given = replace(given, reference="")
    if hasattr(given, "parts"):
        given = replace(given, parts=tuple(without_secrets(part) for part in given.parts))
    plain: Scheme = given
    return plain


def family(scheme: Scheme, spec: ModelSpec, keys: int = 8) -> list[Family]:
    """The scheme's own directions under throwaway keys, an ensemble's of all its parts; filters or
    patterns where it shows none."""
    found: list[Family] = []
    for i in range(keys):
        key = OwnerKey.from_seed(FIRST_KEY + i, "nobody")
        mark: Any = scheme.mark(key, spec)
        shown = [
            m for m in getattr(mark, "parts", (mark,)) if hasattr(m, "directions") and hasattr(m, "group")
        ]
        for part in shown:
            found.append(lambda x, y, m=part: m.directions.all(x, m.group(y)))  # type: ignore[misc]
        if not shown:
            plain = keyed_directions(
                key, spec, n=8, groups=1, kernel_size=5, whitening=1.0, step=8 / 255, context=b"audit"
            )
            found.append(lambda x, y, d=plain: d.all(x, torch.zeros_like(y)))  # type: ignore[misc]
    return found


def responses(suspect: WhiteBox, batch: Batch, families: list[Family]) -> Responses:
    """Take the gradients and project them. One backward pass for each of at most 16 combinations."""
    x, labels = batch
    scores = suspect.query(x)
    p = probabilities(scores)
    basis = _combinations(labels, scores.shape[1])
    gradients = torch.stack(
        [suspect.vjp(x, v if p is None else v / p).flatten(1) for v in basis.unbind(1)], 1
    )
    parts = []
    for s in range(0, len(x), _CHUNK):
        part = slice(s, s + _CHUNK)
        d = torch.cat([f(x[part], labels[part]).flatten(2) for f in families], 1)
        parts.append(torch.einsum("bmp,bqp->bqm", d, gradients[part]))
    if gradients.shape[2] > _PIXELS:
        kept = torch.randperm(gradients.shape[2], generator=torch.Generator().manual_seed(0))[:_PIXELS]
        gradients = gradients[:, :, kept]
    return Responses(torch.cat(parts), gradients, labels)


def _combinations(labels: Tensor, classes: int) -> Tensor:
    """(n, q, C): every score, or 16 random combinations; each summing to zero over the wrong classes."""
    basis = torch.eye(classes)
    if classes > _SCORES:
        raw = torch.randn(classes, _SCORES, generator=torch.Generator().manual_seed(0))
        basis = torch.linalg.qr(raw)[0].T
    wrong = 1 - torch.eye(classes)[labels]
    if classes == 2:  # nothing is left of a single wrong class: take the difference itself
        wrong = torch.ones_like(wrong)
    taken = basis * wrong[:, None]
    return taken - wrong[:, None] * (taken.sum(2, keepdim=True) / wrong.sum(1)[:, None, None])


def statistics(r: Responses, weights: Tensor) -> dict[str, Tensor]:
    """Positive numbers (B,) for each row of ``weights`` (B, n), which sum to 1."""
    n, q, m = r.values.shape
    flat = r.values.reshape(n, -1)
    square, fourth = weights @ flat.square().mean(1), weights @ flat.pow(4).mean(1)
    mean = weights @ flat
    spectrum = torch.linalg.svdvals(mean.reshape(-1, q, m)) / m**0.5
    gradient = (weights @ r.gradients.reshape(n, -1)).square().sum(1)
    size = weights @ r.gradients.reshape(n, -1).square().sum(1)
    return {
        "response size": square.sqrt(),
        "response kurtosis": fourth / square**2,
        "common share": mean.square().mean(1) / square,
        "largest singular value": spectrum[:, 0],
        "largest singular value within classes": _within(r, weights),
        "flatness of the spectrum": spectrum.square().sum(1) / spectrum[:, 0].square(),
        "mean gradient": gradient.sqrt(),
        "mean gradient's share": gradient / size,
    }


def _within(r: Responses, weights: Tensor) -> Tensor:
    """Largest singular value (B,) of the classes' own mean responses, stacked: (classes * q, M)."""
    n, _, m = r.values.shape
    present = r.labels.unique()
    member = (r.labels[None] == present[:, None]).float()
    share = member.sum(1) / n
    stacked = torch.stack(
        [(weights * member[c]) @ r.values.reshape(n, -1) / share[c] ** 0.5 for c in range(len(present))], 1
    ).reshape(len(weights), -1, m)
    # through the Gram matrix (M, M) or its like: far smaller than the stack
    gram = stacked.transpose(1, 2) @ stacked if m < stacked.shape[1] else stacked @ stacked.transpose(1, 2)
    largest: Tensor = torch.linalg.eigvalsh(gram)[:, -1].clamp_min(0).sqrt()
    return largest / math.sqrt(m)


def spectrum(r: Responses, weights: Tensor) -> Tensor:
    """Singular values (B, q) of the mean response, in logits per direction."""
    n, q, m = r.values.shape
    found: Tensor = torch.linalg.svdvals((weights @ r.values.reshape(n, -1)).reshape(-1, q, m))
    return found / math.sqrt(m)


def strange_readings(
    scheme: Scheme, spec: ModelSpec, suspect: WhiteBox, batch: Batch, keys: int
) -> dict[str, Tensor]:
    """What the scheme itself reads with throwaway keys, (keys, bits): for each part of an ensemble, whose
    readings have units of their own."""
    rows = []
    for i in range(keys):
        mark = scheme.mark(OwnerKey.from_seed(FIRST_KEY + i, "nobody"), spec)
        rows.append(scheme.read(mark, suspect, batch, access="white", carriers=len(batch[0])))
    sizes = list(getattr(rows[0], "parts", ())) or [len(rows[0].values)]
    values = torch.stack([r.values.float() for r in rows]).split(sizes, 1)
    names = [p.name for p in getattr(scheme, "parts", ())]
    if len(values) == 1 or len(names) != len(values):
        names = [f"part {i + 1}" if i else "" for i in range(len(values))]
    return {f", {name}" if name else "": value for name, value in zip(names, values, strict=True)}


def features(
    suspect: WhiteBox,
    scheme: Scheme,
    spec: ModelSpec,
    batch: Batch,
    unmarked: WhiteBox | None = None,
    keys: int = 8,
) -> dict[str, float]:
    """Numbers of one network, for a classifier: all the statistics, and the spectrum, as logarithms.

    ``unmarked``: a network of the attacker's own. What the mean response has beyond a multiple of its
    mean response is looked at too: networks of one task respond alike, marks aside.
    """
    r = responses(suspect, batch, family(scheme, spec, keys))
    once = torch.full((1, len(batch[0])), 1 / len(batch[0]))
    found = {name: float(value.log()) for name, value in statistics(r, once).items()}
    heads = (spectrum(r, once)[0] + 1e-9).log()[:9]
    found |= {f"singular value {i + 1}": float(s) for i, s in enumerate(heads)}
    if unmarked is not None:
        own = responses(unmarked, batch, family(scheme, spec, keys)).values.mean(0)
        mean = r.values.mean(0)
        rest = mean - own * (mean * own).sum() / own.square().sum().clamp_min(1e-24)
        s = torch.linalg.svdvals(rest) / math.sqrt(rest.shape[1])
        found["beyond an unmarked network"] = float(rest.square().mean().clamp_min(1e-24).log() / 2)
        found["share beyond it"] = float((rest.square().sum() / mean.square().sum().clamp_min(1e-24)).log())
        found |= {f"singular value {i + 1} beyond it": float(v) for i, v in enumerate((s + 1e-9).log()[:3])}
        mean, own = (_comparison(s, batch).flatten() for s in (suspect, unmarked))
        rest = mean - own * (mean @ own) / own.square().sum().clamp_min(1e-24)
        found["comparison of classes"] = float(mean.square().mean().clamp_min(1e-24).log() / 2)
        found["comparison of classes beyond it"] = float(rest.square().mean().clamp_min(1e-24).log() / 2)
    for name, read in strange_readings(scheme, spec, suspect, batch, keys).items():
        square, fourth = read.square().mean().clamp_min(1e-24), (read**4).mean().clamp_min(1e-24)
        found[f"readings under strange keys{name}"] = float(square.log() / 2)
        found[f"kurtosis under strange keys{name}"] = float(fourth.log() - 2 * square.log())
    return found


def _comparison(suspect: WhiteBox, batch: Batch) -> Tensor:
    """Mean scores (C, C) of every class's inputs, centred over the wrong classes, zero at the right one."""
    x, labels = batch
    scores = suspect.query(x)
    wrong = 1 - torch.eye(scores.shape[1])
    member = torch.nn.functional.one_hot(labels, scores.shape[1]).float()
    mean = wrong * (member.T @ scores) / member.sum(0).clamp_min(1)[:, None]
    return mean - wrong * mean.sum(1, keepdim=True) / wrong.sum(1, keepdim=True)


def compare_gradients(
    model: WhiteBox, control: WhiteBox, scheme: Scheme, spec: ModelSpec, batch: Batch,
    generator: torch.Generator, keys: int = 8,
) -> tuple[list[Detector], dict[str, Any]]:  # fmt: skip
    """Every statistic side by side, resampled over the same inputs; and the spectra, to draw."""
    families = family(scheme, spec, keys)
    a, b = responses(model, batch, families), responses(control, batch, families)
    weights = resampling(len(batch[0]), generator)
    ours, theirs = statistics(a, weights), statistics(b, weights)
    found = [side_by_side(name, PART, ours[name], theirs[name], TOLERANCE[name]) for name in ours]
    rows = resampling(keys, generator)
    x, y = (strange_readings(scheme, spec, s, batch, keys) for s in (model, control))
    for name in x:
        sizes = [(rows @ v[name].square().mean(1)).clamp_min(1e-24).sqrt() for v in (x, y)]
        tails = [(rows @ (v[name] ** 4).mean(1)) / size**4 for v, size in zip((x, y), sizes, strict=True)]
        for what, pair in (("readings under strange keys", sizes), ("kurtosis under strange keys", tails)):
            note = "resampled over keys"
            found.append(side_by_side(f"{what}{name}", PART, pair[0], pair[1], TOLERANCE[what], note))
    return found, {"model": spectrum(a, weights), "control": spectrum(b, weights)}
