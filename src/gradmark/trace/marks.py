"""The tracing mark: what all copies of one marked model share, as a mark file of its own (``trace.json``).

It is committed to by the owner's key like any mark, and names the base mark that it belongs to. Its
probes are calibrated on the very model that copies are made from, and only then have licensees bits.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from gradmark import catalog
from gradmark.codec import MarkFile
from gradmark.ensemble import Ensemble, EnsembleMark
from gradmark.errors import MarkFileError, MismatchError
from gradmark.keys import OwnerKey
from gradmark.protocols import Batch, BlackBox, ModelSpec
from gradmark.trace.codebook import Codebook, tracing_key

SCHEME = "trace"
PARTS = ("filter-gradient", "class-contrast")
BITS = 192
"""Of the filter part. The other part has as many as the classes leave room for (80 with ten classes)."""
CARRIERS = 1000
"""Inputs that a white-box reading takes: what natural readings leave over is the noise that hides colluders,
and reading every contrast at each of these inputs costs a few seconds."""


@dataclass(frozen=True)
class Tracing:
    """An opened tracing mark: secrets, never stored."""

    key: OwnerKey
    """The tracing key, derived from the owner's."""
    probes: Ensemble
    mark: EnsembleMark
    """Its own bits are nobody's; those of licensees come from the ``codebook``."""
    codebook: Codebook

    @property
    def spec(self) -> ModelSpec:
        return self.mark.spec


def default_probes(spec: ModelSpec, options: Mapping[str, Any] | None = None) -> Ensemble:
    """The probes of a tracing mark. ``options`` change the filter part's: ``bits``, ``step``, ..."""
    per_class = min(8, max(1, spec.n_classes - 2))
    room = per_class * math.prod(spec.input_shape) if spec.domain == "vector" else BITS
    first = {"bits": min(BITS, room), "contrasts_per_carrier": per_class, **(options or {})}
    rows = [{"scheme": name, "parameters": {} if i else first} for i, name in enumerate(PARTS)]
    found = catalog.scheme("ensemble", {"parts": rows})
    if not isinstance(found, Ensemble):  # the catalogue sees to it
        raise TypeError(type(found).__name__)
    return found.fitting(spec)


def create(
    base: MarkFile, key: OwnerKey, probes: Ensemble, model: BlackBox, pool: Batch, weights: str
) -> MarkFile:
    """The tracing mark for copies of ``model``, which carries ``base`` and whose digest is ``weights``.

    ``pool``: inputs and labels that the model wasn't trained on; it is read along the probes there.
    """
    base.check_key(key)
    calibrated = probes.calibrated(tracing_key(key, base.digest), base.spec, model, pool)
    parameters = {"base": base.digest, **calibrated.parameters()}
    return MarkFile.create(
        key, SCHEME, parameters, base.spec, "sign-flip", CARRIERS, extra={"weights": weights}
    )


def open_tracing(mark: MarkFile, key: OwnerKey, base: MarkFile) -> Tracing:
    """The secrets of ``mark``. MismatchError where it belongs to another key or base mark, MarkFileError
    where it is no tracing mark."""
    if mark.scheme != SCHEME:
        raise MarkFileError(
            "This mark can't tell copies apart",
            expected="the trace.json that gradmark license wrote",
            found=f"a mark of scheme {mark.scheme}",
        )
    mark.check_key(key)
    parameters = dict(mark.scheme_parameters)
    if parameters.pop("base", None) != base.digest:
        raise MismatchError(
            "The tracing mark belongs to another mark",
            expected=f"the trace.json of {base.digest[:19]}",
            found=str(mark.scheme_parameters.get("base"))[:19],
            fix="Give the mark.json that the copies' model was marked with",
        )
    probes = catalog.scheme("ensemble", parameters)
    if not isinstance(probes, Ensemble):
        raise MarkFileError("The tracing mark has no parts", found=type(probes).__name__)
    own = tracing_key(key, base.digest)
    secret = probes.mark(own, mark.spec)
    return Tracing(own, probes, secret, Codebook.of(probes, own, secret))
