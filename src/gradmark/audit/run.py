"""All parts in a row: can the mark be found, and does it harm?"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from gradmark._version import __version__
from gradmark.audit.effects import Effect, side_effects
from gradmark.audit.gradients import compare_gradients, without_secrets
from gradmark.audit.measure import Detector
from gradmark.audit.queries import compare_queries
from gradmark.audit.weights import compare_weights
from gradmark.errors import DataError, GradmarkError, MismatchError
from gradmark.protocols import Batch, BlackBox, ModelSpec, Scheme, WhiteBox

FEWEST = 40  # inputs, a quarter of them for each part of the black-box comparison
INPUTS = 300  # whose gradients are taken
QUERIES = 2000
MOST = 2000  # inputs used at all


@dataclass(frozen=True)
class Audit:
    """What was found; ``to_json`` is the public interface of ``gradmark audit --json``."""

    model: dict[str, str]
    control: dict[str, str]
    detectors: tuple[Detector, ...]
    side_effects: tuple[Effect, ...]
    settings: dict[str, Any]
    curves: dict[str, Any] = field(repr=False, compare=False)
    notes: tuple[str, ...] = ()

    @property
    def striking(self) -> list[Detector]:
        """The detectors that stand out."""
        return [d for d in self.detectors if d.striking]

    @property
    def worse(self) -> list[Effect]:
        """The side effects in which the model does worse than its control."""
        return [e for e in self.side_effects if e.worse]

    def to_json(self) -> dict[str, Any]:
        return {
            "control": self.control,
            "model": self.model,
            "detectors": [d.to_json() for d in self.detectors],
            "side_effects": [e.to_json() for e in self.side_effects],
            "striking": [f"{d.part}: {d.name}" for d in self.striking],
            "worse": [e.name for e in self.worse],
            "settings": self.settings,
            "notes": list(self.notes),
            "version": __version__,
        }


def audit(
    model: BlackBox,
    control: BlackBox,
    data: Batch,
    spec: ModelSpec,
    scheme: Scheme,
    *,
    seed: int = 0,
    queries: int = QUERIES,
    report: Callable[[str, int, int], None] = lambda stage, step, steps: None,
) -> Audit:
    """Compare ``model`` with its ``control``: the same training without a mark.

    ``data``: natural inputs (n, *shape) and labels (n,) that neither was trained on; no more than 2,000 of
    them are used, 300 for gradients. ``scheme``: the family whose mark might be there, without a key.
    White-box parts are left out, with a note, where a model has no gradients to look at. Raises
    MismatchError where the models or the data don't fit each other, DataError on fewer than 40 inputs.
    """
    scheme = without_secrets(scheme)
    data, spec = _fitting(model, control, data, spec, seed)
    detectors: list[Detector] = []
    curves: dict[str, Any] = {}
    notes: list[str] = []
    report("audit", 0, 4)
    pair = _module(model), _module(control)
    if pair[0] is not None and pair[1] is not None:
        found, curves["layers"] = compare_weights(pair[0], pair[1], _generator(seed, 1))
        detectors += found
    if not curves.get("layers"):
        notes.append("Weights weren't compared: the two don't share a layer that can be looked at.")
    report("audit", 1, 4)
    if isinstance(model, WhiteBox) and isinstance(control, WhiteBox):
        few = data[0][:INPUTS], data[1][:INPUTS]
        found, curves["spectrum"] = compare_gradients(model, control, scheme, spec, few, _generator(seed, 2))
        detectors += found
    else:
        notes.append("Gradients and PGD were left out: not both models are at hand with their weights.")
    report("audit", 2, 4)
    shown: dict[str, Any] = {}
    try:
        found, shown = compare_queries(scheme, spec, model, data, queries, _generator(seed, 3))
        detectors += found
    except GradmarkError as error:  # a scheme that can't be read by queries sends none
        notes.append(f"Queries weren't judged: {error.what}.")
    report("audit", 3, 4)
    effects, more = side_effects(model, control, data, spec, _generator(seed, 4))
    report("audit", 4, 4)
    settings = {"scheme": scheme.name, "parameters": scheme.parameters(), "inputs": len(data[0]),
                "seed": seed, "gradient_inputs": min(INPUTS, len(data[0])), "queries": queries}  # fmt: skip
    return Audit(
        _who(model),
        _who(control),
        tuple(detectors),
        tuple(effects),
        settings,
        curves | shown | more,
        tuple(notes),
    )


def _fitting(
    model: BlackBox, control: BlackBox, data: Batch, spec: ModelSpec, seed: int
) -> tuple[Batch, ModelSpec]:
    """A shuffled sample of the data, and the spec with as many classes as both models answer."""
    x, labels = data
    if len(x) < FEWEST:
        raise DataError(
            "There are too few inputs for an audit", expected=f"{FEWEST} or more", found=str(len(x))
        )
    if x.shape[1:] != spec.input_shape:
        found = str(tuple(x.shape[1:]))
        raise MismatchError(
            "The data doesn't fit the mark", expected=f"inputs {spec.input_shape}", found=found
        )
    chosen = torch.randperm(len(x), generator=_generator(seed, 0))[:MOST]
    x, labels = x[chosen], labels[chosen]
    widths = [s.query(x[:2]).shape[1] for s in (model, control)]
    if widths[0] != widths[1] or widths[0] <= int(labels.max()):
        raise MismatchError(
            "The models and the data don't fit each other",
            expected=f"{int(labels.max()) + 1} classes or more, the same for both",
            found=f"{widths[0]} and {widths[1]}",
        )
    return (x, labels), replace(spec, n_classes=widths[0])


def _module(suspect: BlackBox) -> nn.Module | None:
    module = getattr(suspect, "module", None)
    return module if isinstance(module, nn.Module) else None


def _who(suspect: BlackBox) -> dict[str, str]:
    return {"name": suspect.name, "digest": suspect.digest}


def _generator(seed: int, part: int) -> torch.Generator:
    return torch.Generator().manual_seed(1000 * seed + part)


__all__ = ["Audit", "audit"]
