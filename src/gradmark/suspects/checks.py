"""What every suspect checks in an answer before anyone computes with it."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from gradmark.errors import DataError, GradmarkError, ModelError

MOST_AT_ONCE = 1 << 16
"""The largest fixed batch of a suspect's that is filled up."""


def unwrap(out: Any) -> Any:
    """The class scores inside what a model returned, unchanged where it is an array already.

    Takes ``.logits`` of an object (Hugging Face's ModelOutput), ``["logits"]`` of a dictionary and
    the first item of a tuple or list of tensors (a model that returns auxiliary heads too).
    """
    if isinstance(out, Tensor):
        return out
    if isinstance(out, dict) and "logits" in out:
        return out["logits"]
    if hasattr(out, "logits"):
        return out.logits
    if isinstance(out, (tuple, list)) and out and isinstance(out[0], Tensor) and out[0].ndim >= 2:
        return out[0]
    return out


def check_scores(
    out: Any,
    b: int,
    n_classes: int | None = None,
    source: str = "the model",
    error: type[GradmarkError] = ModelError,
) -> Tensor:
    """``out`` as class scores (b, C), float32 on the CPU.

    ``out`` is a tensor, a numpy array or nested lists of numbers. ``n_classes`` is the class count
    of earlier answers, None for a first one. Raises ``error`` where the answer isn't a matrix, has
    another number of rows than the batch, has changed its class count, or isn't finite.
    """
    out = unwrap(out)
    wanted = f"scores of shape ({b}, {n_classes if n_classes is not None else 'classes'})"
    try:
        scores = out.detach() if isinstance(out, Tensor) else torch.as_tensor(out)
        if scores.is_complex():
            raise TypeError("complex numbers")
        scores = scores.to(device="cpu", dtype=torch.float32)
    except (TypeError, ValueError, RuntimeError, OverflowError) as cause:
        found = f"{type(out).__name__} that is no array of numbers"
        raise error(f"{source} gave no class scores", expected=wanted, found=found) from cause
    shape = tuple(scores.shape)
    if scores.ndim != 2 or shape[0] != b or shape[1] == 0:
        fix = "Return one row of class scores for each input"
        raise error(f"{source} gave scores of a wrong shape", expected=wanted, found=str(shape), fix=fix)
    if n_classes is not None and shape[1] != n_classes:
        found = f"{shape[1]} classes, {n_classes} before"
        raise error(f"{source} changed its number of classes", expected=wanted, found=found)
    bad = int((~torch.isfinite(scores)).any(dim=1).sum())
    if bad:
        found = f"NaN or infinity in the scores of {bad} of {b} inputs"
        raise error(f"{source} gave scores that aren't finite", expected="finite numbers", found=found)
    return scores


def check_inputs(x: Tensor, what: str = "the suspect") -> Tensor:
    """``x`` (b, *shape), detached. Raises DataError where there is no batch or a value isn't finite."""
    if x.ndim < 2 or x.shape[0] == 0:
        raise DataError(
            f"{what} was asked nothing",
            expected="inputs of shape (b, ...), b >= 1",
            found=str(tuple(x.shape)),
        )
    if x.is_floating_point() and not bool(torch.isfinite(x).all()):
        raise DataError(f"{what} was sent inputs that aren't finite", expected="finite numbers")
    return x.detach()


def device_of(module: nn.Module) -> torch.device:
    """Where the module's first weight or buffer lies; the CPU where it has none."""
    tensors = (*module.parameters(), *module.buffers())
    return tensors[0].device if tensors else torch.device("cpu")


def brief(cause: BaseException, limit: int = 200) -> str:
    """The first line of an exception's text, for another error's ``found``."""
    lines = str(cause).strip().splitlines()
    return f"{type(cause).__name__}: {lines[0][:limit].rstrip('.')}" if lines else type(cause).__name__


def has_rnn(model: nn.Module) -> bool:
    """Whether some part of ``model`` is a recurrent network of torch's own."""
    return any(isinstance(part, nn.RNNBase) for part in model.modules())


def rnns_without_cudnn(model: nn.Module) -> AbstractContextManager[Any]:
    """A block in which ``model``'s RNNs, if it has any, can be differentiated in evaluation mode too."""
    return torch.backends.cudnn.flags(enabled=False) if has_rnn(model) else nullcontext()
