"""The benchmark's attacks: one table of names, parameters and labels, read off published studies.

The list follows Lukas, Jiang, Li and Kerschbaum, "SoK: How Robust is Image Classification Deep Neural
Network Watermarking?" (IEEE S&P 2022), with rewrites that keep the function and defences of an API
added. The combinations are our choice: what a thief would do next after each family's best single attack.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from gradmark.errors import UsageError
from gradmark.protocols import Access, Domain

NONE = "none"
_QUERY_SIDE = ("input-", "output-", "detect-")
_STUDENTS = ("distill", "hard-labels", "knockoff")
REWRITES = ("permute", "rescale", "flip-signs", "dummy", "fold")
"""What changes the weights and keeps the function: it needs no scores."""


@dataclass(frozen=True)
class Configured:
    """An attack with its numbers. ``label`` names its cells; ``domains``: where it makes sense.

    No domains stand for all of them. The attack ``none`` leaves the model as it is. ``owners``: the thief
    trains with the owner's optimizer and rate instead of his own.
    """

    label: str
    name: str
    parameters: Mapping[str, Any] = field(default_factory=dict)
    domains: tuple[Domain, ...] = ()
    owners: bool = False

    @property
    def query_side(self) -> bool:
        """Whether it defends an API rather than changing the weights: then only queries are read.

        A student is a new network, whatever his teacher stood behind.
        """
        steps = self.name.split("+")
        taught = [i + 1 for i, step in enumerate(steps) if step in _STUDENTS]
        return any(step.startswith(_QUERY_SIDE) for step in steps[max(taught, default=0) :])

    def accesses(self, needs: Access) -> tuple[Access, ...]:
        """The ways to read a scheme that ``needs`` at least this access; empty where there is none."""
        white: tuple[Access, ...] = () if self.query_side else ("white",)
        black: tuple[Access, ...] = ("black",) if needs == "black" else ()
        return white + black


def standard(*, tune: int = 5, extract: int = 30) -> tuple[Configured, ...]:
    """Every attack; ``tune``, ``extract``: epochs of fine-tuning and of extraction."""
    return (*_unchanged(), *_training(tune), *_weights(), *_extraction(extract), *_queries(),
            *_combined(tune, extract), *_as_the_owner(tune), *_matched(extract))  # fmt: skip


def _unchanged() -> list[Configured]:
    """Rewrites that keep the function, and no attack at all."""
    return [Configured(NONE, NONE), *(Configured(name, name) for name in REWRITES)]


def _training(tune: int) -> list[Configured]:
    """Attacks that train on the thief's labels."""
    rows = [
        Configured(f"finetune-lr{factor:g}", "finetune", {"epochs": tune, "lr_factor": factor})
        for factor in (0.1, 0.3, 1.0, 3.0)
    ]
    rows.append(Configured("finetune-long", "finetune", {"epochs": 4 * tune, "lr_factor": 1.0}))
    names = ("ftll", "rtll", "rtal", "smooth", "regularize", "adversarial", "lora", "overwrite", "launder",
             "flatten", "subtract-mean", "self-distill", "dark-noise", "gradient-masking")  # fmt: skip
    rows += [Configured(name, name, {"epochs": tune}) for name in names]
    rows += [
        Configured(f"fine-prune-{f:g}", "fine-prune", {"epochs": tune, "fraction": f}) for f in (0.3, 0.7)
    ]
    return rows


def _weights() -> list[Configured]:
    """Attacks on the weights that need no training."""
    rows = [Configured(f"prune-{f:g}", "prune", {"fraction": f}) for f in (0.3, 0.5, 0.7)]
    rows.append(Configured("prune-structured-0.3", "prune", {"fraction": 0.3, "structured": True}))
    rows += [Configured(f"quantize-{b}", "quantize", {"bits": b}) for b in (8, 5, 4, 3)]
    rows += [Configured(f"quantize-{kind}", "quantize", {"kind": kind}) for kind in ("fp8", "bf16")]
    rows.append(Configured("torchao-int8", "torchao-int8"))
    rows += [Configured(f"noise-{v:g}", "noise", {"level": v}) for v in (0.05, 0.1, 0.2)]
    rows += [Configured(f"weight-shift-{v:g}", "weight-shift", {"strength": v}) for v in (0.5, 1.5)]
    return rows + [Configured(f"average-{v:g}", "average", {"share": v}) for v in (0.2, 0.5)]


def _extraction(epochs: int) -> list[Configured]:
    """A new network that learns from the stolen one's answers."""
    return [
        Configured("distill", "distill", {"epochs": epochs}),
        Configured("distill-t1", "distill", {"epochs": epochs, "temperature": 1.0}),
        Configured("distill-cross", "distill", {"epochs": epochs, "student": "other"}),
        Configured("distill-sibling", "distill", {"epochs": epochs, "student": "sibling"}),
        Configured("distill-surrogate", "distill", {"epochs": epochs, "surrogate": True}),
        Configured("hard-labels", "hard-labels", {"epochs": epochs}),
        Configured("knockoff", "knockoff", {"epochs": epochs}),
    ]


def _queries() -> list[Configured]:
    """What a thief puts before or behind the model's API."""
    images: tuple[Domain, ...] = ("image",)
    spatial: tuple[Domain, ...] = ("image", "signal")
    return [
        Configured("input-noise", "input-noise"),
        Configured("input-smooth", "input-smooth", domains=spatial),
        Configured("input-jpeg", "input-jpeg", domains=images),
        Configured("input-depth", "input-depth"),
        Configured("input-flip", "input-flip", domains=images),
        Configured("input-crop", "input-crop", domains=spatial),
        Configured("input-squeeze", "input-squeeze", domains=spatial),
        Configured("input-pca", "input-pca"),
        *(Configured(f"output-round-{d}", "output-round", {"decimals": d}) for d in (1, 2, 3)),
        Configured("output-temperature", "output-temperature"),
        Configured("output-noise", "output-noise"),
        Configured("output-top1", "output-top1"),
        Configured("output-topk", "output-topk"),
        Configured("detect-probes", "detect-probes"),
    ]


def _combined(tune: int, extract: int) -> list[Configured]:
    """Five combinations: parameters by the step's name."""
    tuning, pruning = {"epochs": tune, "lr_factor": 1.0}, {"fraction": 0.5}
    rows: dict[str, dict[str, Any]] = {
        "prune+finetune+quantize": {"prune": pruning, "finetune": tuning, "quantize": {"bits": 5}},
        "finetune+noise+average": {"finetune": tuning, "noise": {"level": 0.05}, "average": {"share": 0.2}},
        "adversarial+fine-prune": {
            "adversarial": {"epochs": tune},
            "fine-prune": {"epochs": tune, "fraction": 0.5},
        },
        "distill+finetune": {"distill": {"epochs": extract}, "finetune": tuning},
        "input-noise+output-round": {"output-round": {"decimals": 2}},
    }
    return [Configured(name, name, parameters) for name, parameters in rows.items()]


def _as_the_owner(tune: int) -> list[Configured]:
    """The hardest of those that train, with the owner's own optimizer and rate."""
    names = ("finetune", "rtal", "regularize", "launder")
    return [Configured(f"{name}-owner", name, {"epochs": tune}, owners=True) for name in names]


def _matched(extract: int) -> list[Configured]:
    """By who has read what the wrong classes carry: he makes them ordinary, and teaches a student so."""
    his = {"own": "fresh", "epochs": extract}
    taught = {"distill": {"epochs": extract}}
    by_sibling = {"distill": {"epochs": extract, "student": "sibling"}}
    chain = "output-match+distill"
    return [
        Configured("output-match", "output-match"),
        Configured("output-graft", "output-match", {"kind": "whole"}),
        Configured(chain, chain, {"output-match": his, **taught}),
        Configured(
            "output-match-linear+distill", chain, {"output-match": {**his, "kind": "linear"}, **taught}
        ),
        Configured(
            "output-match-kernel+distill", chain, {"output-match": {**his, "kind": "kernel"}, **taught}
        ),
        Configured("output-graft+distill", chain, {"output-match": {**his, "kind": "whole"}, **taught}),
        Configured(f"{chain}-sibling", chain, by_sibling),
        Configured(
            "output-match-linear+distill-sibling", chain, {"output-match": {"kind": "linear"}, **by_sibling}
        ),
    ]


def select(wanted: list[Any], table: tuple[Configured, ...]) -> tuple[Configured, ...]:
    """Attacks of a suite file: labels or patterns of the ``table``, or objects with name, label, parameters.

    UsageError on what is neither.
    """
    found: dict[str, Configured] = {}
    for item in wanted:
        rows = _given(item) if isinstance(item, dict) else [
            row for row in table if fnmatch.fnmatchcase(row.label, "*" if item == "all" else str(item))
        ]  # fmt: skip
        if not rows:
            labels = ", ".join(row.label for row in table)
            raise UsageError(f"No attack is labelled {item!r}", expected=f"a label or pattern of {labels}")
        found |= {row.label: row for row in rows}
    return tuple(found.values())


def _given(item: dict[str, Any]) -> list[Configured]:
    name, parameters = item.get("name"), item.get("parameters", {})
    if not isinstance(name, str) or not isinstance(parameters, dict) or item.keys() - {
        "label", "name", "parameters",
    }:  # fmt: skip
        raise UsageError("An attack of the suite makes no sense", expected="name, label, parameters",
                         found=str(item))  # fmt: skip
    return [Configured(str(item.get("label", name)), name, parameters)]
