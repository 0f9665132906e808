"""Evaluation mode for the length of a block."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def evaluation(model: nn.Module) -> Iterator[None]:
    """Every submodule in evaluation mode inside, as it was after, whatever happens.

    The penalty's forward must neither move batch-norm statistics nor couple the batch.
    """
    before = [(module, module.training) for module in model.modules() if module.training]
    for module, _ in before:
        module.training = False
    try:
        yield
    finally:
        for module, training in before:
            module.training = training
