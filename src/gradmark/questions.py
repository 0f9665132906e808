"""What a scheme offers to a reading that goes step by step (:mod:`gradmark.sequential`)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Questions:
    """The observations that can be asked for, none of which depends on a bit.

    Bits come in cells of ``width``: cell ``c`` holds the bits from ``c * width`` on, and one
    observation of it reads all of them at the cost of ``cost`` queries. ``rooms``: how many
    observations of each cell there are; where it is one, a bit gets no clearer by asking again.
    ``ask``: from a cell's number and the observation's to inputs (cost, *shape). ``read``: from the
    log-scores (m, cost, C) of m observations, their cells (m,) and numbers (m,), to readings (m, width).
    ``reference`` (n,): what an unmarked network reads, or None.
    """

    bits: Tensor
    width: int
    cost: int
    rooms: tuple[int, ...]
    ask: Callable[[int, int], Tensor]
    read: Callable[[Tensor, Tensor, Tensor], Tensor]
    reference: Tensor | None = None
