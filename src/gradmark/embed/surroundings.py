"""What ``gradmark preflight`` tells: what is in and around a model, what is done about it, what is right."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.parallel import DataParallel, DistributedDataParallel

from gradmark.embed.modes import penalty_mode
from gradmark.embed.preflight import METHODS, Check, check_method, some_carriers
from gradmark.embed.ranks import Ranks
from gradmark.embed.wrappers import REENTRANT, compiled, operations, refuse, sharded
from gradmark.errors import PreflightError
from gradmark.protocols import Batch, Mark, Scheme
from gradmark.suspects.checks import brief, has_rnn, unwrap

_NO_SECOND = (
    ("ScaledDotProduct", "fused attention", "exact: attention by its formula around the penalty"),
    ("MkldnnRnn", "a fused RNN", "exact: oneDNN is off around the penalty"),
    ("CtcLoss", "a CTC loss in forward", "central difference"),
)


@dataclass(frozen=True)
class Finding:
    """``what`` is there, and what the marker does about it, or what you must do."""

    what: str
    cure: str


@dataclass(frozen=True)
class Preflight:
    """``method``: the one that the marker will take, or None where it refuses, for ``reason``."""

    method: str | None
    findings: tuple[Finding, ...]
    checks: tuple[Check, ...]
    reason: str = ""

    def to_json(self) -> dict[str, Any]:
        """JSON values; numbers that aren't finite are null."""
        rows = [
            {n: None if isinstance(v, float) and not math.isfinite(v) else v for n, v in asdict(c).items()}
            for c in self.checks
        ]
        return {
            "ok": self.method is not None,
            "method": self.method,
            "findings": [asdict(f) for f in self.findings],
            "checks": rows,
            "reason": self.reason,
        }


def survey(scheme: Scheme, mark: Mark, model: nn.Module, batch: Batch, wanted: str = "auto") -> Preflight:
    """Look at ``model`` as training has it: on its device, in the precision around this call, wrapped.

    ``batch``: inputs (b, *shape) and labels (b,); four of them are used. Nothing in the model changes.
    """
    try:
        refuse(model)
    except PreflightError as refusal:
        return Preflight(None, (Finding(refusal.found, refusal.fix),), (), str(refusal))
    few = some_carriers(scheme, mark, batch)
    findings = (*_wrappers(model), *_inside(model, few))
    checks = tuple(check_method(scheme, mark, model, few, m) for m in METHODS if wanted in ("auto", m))
    if any(c.recomputes for c in checks):
        findings = (
            *findings,
            Finding("checkpointing", "the gradient is taken at once, in the penalty's mode"),
        )
    right = next((c.method for c in checks if c.ok), None)
    reason = "" if right else "; ".join(f"{c.method}: {c.reason}" for c in checks)
    return Preflight(right, findings, checks, reason)


def _wrappers(model: nn.Module) -> list[Finding]:
    """What is around it."""
    found = []
    if any(isinstance(m, DistributedDataParallel) for m in model.modules()):
        static = any(getattr(m, "static_graph", False) for m in model.modules())
        name = "DDP with static_graph" if static else "DDP"
        found.append(Finding(name, "the module inside is asked; call backward once, on task plus penalty"))
    if any(isinstance(m, DataParallel) for m in model.modules()):
        found.append(Finding("DataParallel", "the module inside is asked, on its first device"))
    if sharded(model):
        found.append(Finding("FSDP2", "first order only; checked in place, since shards can't be copied"))
    if compiled(model):
        found.append(Finding("torch.compile", "the penalty runs it as written; the task stays compiled"))
    if Ranks.here().size > 1:
        found.append(Finding(f"{Ranks.here().size} processes", "one mark, carriers from all of them"))
    return found


def _inside(model: nn.Module, batch: Batch) -> list[Finding]:
    """What its own forward pass is made of."""
    found = []
    if any(isinstance(m, _NormBase) and m.training for m in model.modules()):
        found.append(Finding("batch norm in training", "batch statistics; running ones stay as they are"))
    if _cudnn_rnn(model, batch[0].device):
        found.append(Finding("a cuDNN RNN", "cuDNN is off around the penalty"))
    try:
        with penalty_mode(model), torch.random.fork_rng(devices=[]):
            x = batch[0].detach().requires_grad_(batch[0].is_floating_point())
            names, custom = operations(unwrap(model(x)))
    except Exception as cause:  # the checks say the same of every method; here it is only left out
        return [*found, Finding("a forward pass that fails", brief(cause))]
    for start, what, cure in _NO_SECOND:
        if any(name.startswith(start) for name in names):
            found.append(Finding(what, cure))
    if REENTRANT in names:
        found.append(Finding("reentrant checkpointing", "central difference; norms by a whole backward pass"))
    for name in sorted(set(custom) - {REENTRANT}):
        found.append(Finding(f"custom Function {_plain(name)}", "believed by the numbers alone"))
    return found


def _plain(name: str) -> str:
    return name.removesuffix("Backward")


def _cudnn_rnn(model: nn.Module, device: torch.device) -> bool:
    """Whether training runs cuDNN's RNNs, which the penalty's own pass never shows."""
    return device.type == "cuda" and torch.backends.cudnn.is_available() and has_rnn(model)
