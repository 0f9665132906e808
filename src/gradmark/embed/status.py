"""Where embedding stands."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class MarkStatus:
    """Where embedding stands, estimated on training carriers (the proof is ``verify``)."""

    n_bits: int
    match: float
    log10_p: float
    weight: float
    push: float
    method: str
