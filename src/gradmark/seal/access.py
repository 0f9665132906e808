"""From a suspect, or its bare tensors, to a check with the best access there is."""

from __future__ import annotations

import torch.fx
from torch import Tensor

from gradmark.errors import UsageError
from gradmark.protocols import Access, BlackBox
from gradmark.seal.check import Checked, check
from gradmark.seal.codec import SealFile
from gradmark.suspects import ModuleSuspect, file_digest


def check_suspect(
    seal: SealFile, suspect: BlackBox | None, access: Access | None, tensors: dict[str, Tensor] | None = None,
    name: str = "the suspect",
) -> Checked:  # fmt: skip
    """:func:`gradmark.seal.check` with the access that was asked for, or the best there is."""
    if tensors is None and isinstance(suspect, ModuleSuspect):
        tensors = suspect.module.state_dict()
    if access == "white" and tensors is None:
        raise UsageError(f"{name} can't be checked white-box", fix="leave --access out")
    if access == "black" and suspect is None:
        raise UsageError(f"{name} holds weights only, and can't answer", fix="Give --model MODULE:FACTORY")
    digest = file_digest(name) if suspect is None else ""
    own = isinstance(suspect, ModuleSuspect) and any(
        isinstance(part, torch.fx.GraphModule) for part in suspect.module.modules()
    )
    tensors = None if access == "black" else tensors
    return check(seal, suspect, tensors=tensors, digest=digest, own_program=own)


__all__ = ["check_suspect"]
