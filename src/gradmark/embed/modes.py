"""The mode in which a penalty looks at a model, for the length of a block."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase

from gradmark.embed.wrappers import block, plain_kernels
from gradmark.errors import ModelError
from gradmark.scores import wide
from gradmark.suspects.checks import unwrap


def _copied(buffer: Tensor | None) -> Tensor | None:
    """Of a norm that may have none."""
    return None if buffer is None else buffer.detach().clone()


@contextmanager
def penalty_mode(model: nn.Module, method: str = "central-difference") -> Iterator[None]:
    """Evaluation mode (no dropout), but batch norms that are training keep their batch statistics.

    The running statistics lag behind the weights. A penalty taken with them is cheaply met by
    changes that the statistics undo a few steps later: measured on ResNet-20, a mean reading of
    .3 logits during training left .06 after it, against .15 and .19 with batch statistics
    (``docs/science.md``). The running statistics themselves stay untouched, and everything is
    as it was afterwards, whatever happens. Kernels are such as ``method`` can differentiate.
    """
    modes = [(module, module.training) for module in model.modules() if module.training]
    norms = [m for m, _ in modes if isinstance(m, _NormBase) and m.track_running_stats]
    tracked = [(m, m.momentum, m.num_batches_tracked, m.running_mean, m.running_var) for m in norms]
    try:
        for module, _ in modes:
            module.training = isinstance(module, _NormBase)
        for norm in norms:
            norm.momentum = 0.0
            # Stand-ins: SyncBatchNorm insists on a count; nothing times infinity would stay behind as NaN.
            for name in ("num_batches_tracked", "running_mean", "running_var"):
                setattr(norm, name, _copied(getattr(norm, name)))
        with plain_kernels(model, exact=method == "exact"):
            yield
    finally:
        for norm, momentum, count, mean, var in tracked:
            norm.momentum = momentum
            norm.num_batches_tracked, norm.running_mean, norm.running_var = count, mean, var
        for module, training in modes:
            module.training = training


def scores_beside(model: nn.Module, natural: Tensor, x: Tensor) -> Tensor:
    """Scores (m, C) of secret inputs ``x`` (m, *shape) as training leaves them, at least float32.

    Batch norms that are training take their statistics from ``natural`` alone; see :func:`scores_of_both`.
    """
    if not any(isinstance(m, _BatchNorm) and m.training for m in model.modules()):
        return wide(unwrap(model(x)))
    return scores_of_both(model, natural, x)[1]


def scores_of_both(model: nn.Module, natural: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Scores (b, C) of ``natural`` (b, *shape) and (m, C) of ``x`` (m, *shape), in float32 at least.

    Batch norms that are training take their statistics from ``natural`` alone, which goes
    through the model beside ``x``: secret inputs look like no others, and what a norm makes of a batch
    of them is not what it will make of them when the owner asks. Raises ModelError where a norm doesn't get a
    row for each input, so that it can't be told which are natural.
    """
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.training]
    natural = natural.to(x)
    n, stack, passes, going = len(natural), block(), list[tuple[torch.Size, float]](), [True]

    def normalised(norm: _BatchNorm, inputs: tuple[Tensor, ...], _: Tensor) -> Tensor | None:
        h = wide(inputs[0])
        if not going[0] and not any(_same(h, known) for known in passes):
            return None  # another pass
        if stack is not None and going[0]:
            passes.append((h.shape, _size(h)))
        if len(h) != n + len(x):
            raise ModelError(
                "A batch norm sees the batch in another shape than the model", expected=f"{n + len(x)} rows",
                found=f"{len(h)} in {type(norm).__name__}", fix="Leave triggers, probes and soften out",
            )  # fmt: skip
        axes = [0, *range(2, h.ndim)]
        var, mean = torch.var_mean(h[:n], axes, correction=0, keepdim=True)
        shape = [1, -1, *[1] * (h.ndim - 2)]
        y = (h - mean) * (var + norm.eps).rsqrt()
        if norm.affine:
            y = y * norm.weight.to(y).reshape(shape) + norm.bias.to(y).reshape(shape)
        return y.to(inputs[0])

    handles = [norm.register_forward_hook(normalised) for norm in norms]
    try:
        scores = wide(unwrap(model(torch.cat([natural, x]))))
    finally:
        going[0] = False
        for handle in handles:
            if stack is None:
                handle.remove()
            else:  # what is checkpointed passes its norms again before the gradient is there
                stack.callback(handle.remove)
    return scores[:n], scores[n:]


def _size(h: Tensor) -> float:
    return float(h.detach().abs().sum())


def _same(h: Tensor, known: tuple[torch.Size, float]) -> bool:
    return h.shape == known[0] and math.isclose(_size(h), known[1], rel_tol=1e-5)
