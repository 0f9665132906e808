"""Marks that could be seen: a penalty of their own keeps what they write to from looking marked."""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn


@runtime_checkable
class Discreet(Protocol):
    """A scheme that keeps what it writes to from looking marked."""

    def distortion(self, mark: Any, model: nn.Module) -> Tensor:
        """Scalar, differentiable in the weights: how far the model looks from an unmarked one."""
        ...


def discreetly(loss: Tensor, scheme: Any, mark: Any, model: nn.Module) -> Tensor:
    """``loss`` and the scheme's distortion, where it has one."""
    return loss + scheme.distortion(mark, model).to(loss) if isinstance(scheme, Discreet) else loss
