"""Is the penalty's gradient right on this very model? Asked before training starts.

Fused attention, cuDNN RNNs and some custom autograd Functions have no double backward, or a
silently wrong one. Two looks are taken. The gradient of the mean reading with respect to the weights
is compared with a finite difference along random weight directions. Readings of ReLU nets jump where a
unit switches (their second derivative lives on the kinks, which autograd rightly leaves out at a
point), so this runs on a float64 copy with a step so small that hardly a unit switches, and smaller still
where the two disagree: a wrong gradient stays wrong at every step. Then the gradient
that the model itself gives, on its device, in its precision and inside its wrappers, is compared with the
copy's. A model that can't be copied (FSDP2) is held against a coarser finite difference of its own.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

from gradmark.embed.modes import penalty_mode
from gradmark.embed.ranks import Ranks
from gradmark.embed.wrappers import (
    bare,
    lasting,
    needs_whole_backward,
    reshard,
    sharded,
    trainable,
    weight_gradients,
)
from gradmark.errors import PreflightError, UsageError
from gradmark.protocols import Batch, Choosy, Mark, Scheme
from gradmark.scores import check_range
from gradmark.suspects.checks import brief, device_of

METHODS = ("central-difference", "exact")
"""In order of preference: the central difference costs less, needs no second order, and trains
the very finite step that a black-box reading takes."""

TOLERANCE = 1e-3
"""Of the float64 copy against a finite difference."""
IN_PLACE = 0.05
"""Of what can't be copied against its own differences, in float32."""
OWN = 0.3
"""Of float32 gradients against the copy's: tf32 stays below it. Half precision's noise has no such bound."""
SHARE = 0.5
"""By which its share along the copy's may miss 1: a wrong sign, a factor or a lost part does by more."""
_STEPS = (1e-8, 1e-9, 1e-10)  # relative to the norm of the weights
"""At the first, a unit switches in one network of some hundreds; rounding at the last adds 1e-5."""
_STEPS_IN_PLACE = (2e-4,)
_LEAST = 1e-2  # root mean square of a direction, by tensor
_DIRECTIONS = 3
_ROOM = 0.5  # of their range, by which augmented inputs may lie outside of it; normalised ones lie further
_TWICE = "reentrant checkpointing under DDP reduces a weight twice in a step with a penalty"
_MOODY = "checkpointed dropout or batch norm under FSDP2 runs again in another mode than before"
_MOODS = (nn.modules.dropout._DropoutNd, nn.modules.batchnorm._NormBase)
_HALVES = (torch.float16, torch.bfloat16)


def check_method_name(method: str) -> None:
    """UsageError where there is no such method."""
    if method not in (*METHODS, "auto"):
        raise UsageError("No such method", expected=f"auto or one of {', '.join(METHODS)}", found=method)


@dataclass(frozen=True)
class Check:
    """How one method fared.

    ``error``: against a finite difference, relative to the larger of the two derivatives. ``own``: the
    model's own gradient against the copy's, relative norm of the difference; None where there is no copy.
    ``recomputes``: modules run again in the backward pass (checkpointing).
    """

    method: str
    ok: bool
    error: float
    reason: str = ""
    own: float | None = None
    recomputes: bool = False


def check_method(scheme: Scheme, mark: Mark, model: nn.Module, batch: Batch, method: str) -> Check:
    """Compare one method's gradient with a finite difference; ``batch`` of a few inputs suffices."""
    model = bare(model)
    if not trainable(model):
        return Check(method, False, float("nan"), "no weight of the model requires a gradient")
    generator = torch.Generator()

    def reading(of: nn.Module, inputs: Batch) -> Tensor:
        return scheme.probe(mark, of, inputs, generator.manual_seed(0), method)[0].sum()

    try:
        twin = _copied(model)
    except Exception:  # a stranger's module may refuse in any way; FSDP2 does
        return _in_place(model, method, lambda: reading(model, batch))
    x = batch[0].double() if batch[0].is_floating_point() else batch[0]
    with torch.autocast(device_of(twin).type, enabled=False):
        found, known = _judged(twin, method, lambda: reading(twin, (x, batch[1])), _STEPS, TOLERANCE)
    if not found.ok or known is None:
        return found
    return _beside(model, found, known, lambda: reading(model, batch))


def choose_method(scheme: Scheme, mark: Mark, model: nn.Module, batch: Batch, wanted: str = "auto") -> Check:
    """The first method that is right here. Raises PreflightError, with every reason, if none is.

    MismatchError where the inputs aren't on the scale of the model's spec.
    """
    check_range(mark.spec, batch[0], _ROOM)
    few = some_carriers(scheme, mark, batch)
    checks = []
    for method in METHODS if wanted == "auto" else (wanted,):
        checks.append(check_method(scheme, mark, model, few, method))
        if checks[-1].ok:
            return checks[-1]
    raise refusal(checks)


def refusal(checks: Sequence[Check]) -> PreflightError:
    """What a user is told where no method is right."""
    return PreflightError(
        "No method gives a right penalty gradient on this model",
        expected=f"a relative error of at most {TOLERANCE} against a finite difference",
        found="; ".join(f"{c.method}: {c.reason} (error {c.error:.2g})" for c in checks),
        fix="try method='auto', eager attention, non-reentrant checkpointing, or the model unwrapped",
    )


def some_carriers(scheme: Scheme, mark: Mark, batch: Batch) -> Batch:
    """A few inputs of the batch, those that can carry the penalty first; all of one class, if there are as
    many, for a scheme that reads what varies within a class."""
    labels = batch[1]
    first = torch.arange(len(labels), device=labels.device)
    if isinstance(scheme, Choosy):
        first = scheme.carrying(mark, labels).int().argsort(descending=True, stable=True)
    if not getattr(scheme, "steady", True):
        company = (labels[:, None] == labels).sum(1)
        first = (labels == labels[company.argmax()]).int().argsort(descending=True, stable=True)
    return batch[0][first[:4]], batch[1][first[:4]]


def _copied(model: nn.Module) -> nn.Module:
    """A float64 copy that asks its own weights.

    Libraries that bind a new ``forward`` to a module (accelerate's autocast) bind the old weights with it.
    """
    twin = copy.deepcopy(model)
    for part in twin.modules():
        if "forward" in vars(part) and type(part).forward is not nn.Module.forward:
            del part.forward
    return twin.double()


def _judged(
    model: nn.Module, method: str, reading: Callable[[], Tensor], lengths: Sequence[float], tolerance: float
) -> tuple[Check, list[Tensor] | None]:
    """The verdict of finite differences on ``model``, and the gradient that was judged."""
    weights = trainable(model)
    devices = [device_of(model)] if device_of(model).type == "cuda" else []
    with torch.random.fork_rng(devices=devices), penalty_mode(model, method):
        try:
            with lasting():
                value = reading()
                whole = needs_whole_backward(model, value)
                if whole and not sharded(model) and Ranks.here().size > 1:
                    return Check(method, False, float("nan"), _TWICE), None
                with _forwards() as again:
                    gradient = weight_gradients(value, weights, whole=whole)
        except Exception as cause:  # a stranger's forward or backward may raise anything
            return Check(method, False, float("nan"), brief(cause)), None
        if again and sharded(model) and any(isinstance(m, _MOODS) for m in model.modules()):
            return Check(method, False, float("nan"), _MOODY), None
        known = [torch.zeros_like(w) if g is None else g for w, g in zip(weights, gradient, strict=True)]
        size = _size(known)
        if size == 0 or not torch.isfinite(torch.tensor(size)):
            return Check(method, False, float("nan"), "the gradient is zero or not finite"), None
        worst = 0.0
        for seed in range(_DIRECTIONS):
            errors = []
            for length in lengths:
                errors.append(_compare(reading, weights, known, seed, length, lambda: reshard(model)))
                if errors[-1] <= tolerance:
                    break
            worst = max(worst, min(errors))
    ok = worst <= tolerance
    reason = "" if ok else "the gradient disagrees with a finite difference"
    return Check(method, ok, worst, reason, recomputes=bool(again)), known


@contextmanager
def _forwards() -> Iterator[list[str]]:
    """Names of the modules whose ``forward`` runs meanwhile: in a backward pass, the checkpointed ones."""
    found: list[str] = []
    hook = register_module_forward_pre_hook(lambda module, _: found.append(type(module).__name__))
    try:
        yield found
    finally:
        hook.remove()


def _in_place(model: nn.Module, method: str, reading: Callable[[], Tensor]) -> Check:
    """For what can't be copied: a finite difference of the model itself, in full precision."""
    with torch.autocast(device_of(model).type, enabled=False):
        return _judged(model, method, reading, _STEPS_IN_PLACE, IN_PLACE)[0]


def _beside(model: nn.Module, found: Check, known: list[Tensor], reading: Callable[[], Tensor]) -> Check:
    """``found`` with the model's own gradient, as training will take it, held against its copy's."""
    weights = trainable(model)
    with torch.random.fork_rng(devices=[]), penalty_mode(model, found.method):
        try:
            with lasting():
                value = reading()
                gradient = weight_gradients(value, weights, whole=needs_whole_backward(model, value))
        except Exception as cause:  # as above; in the user's own precision other kernels run
            return replace(found, ok=False, reason=brief(cause))
    apart = [k if g is None else k - g.double() for g, k in zip(gradient, known, strict=True)]
    own = _size(apart) / _size(known)
    half = torch.is_autocast_enabled(device_of(model).type) or any(w.dtype in _HALVES for w in weights)
    share = 1 - _total(_along(apart, known), known) / _size(known) ** 2
    ok = abs(share - 1) <= SHARE and (half or own <= OWN)
    reason = "" if ok else "the model's own gradient disagrees with that of its float64 copy"
    return replace(found, ok=ok, own=own, reason=reason)


def _compare(
    reading: Callable[[], Tensor],
    weights: Sequence[nn.Parameter],
    gradient: Sequence[Tensor],
    seed: int,
    length: float,
    reshard: Callable[[], None],
) -> float:
    """Relative error along one random direction scaled like the weights, tensor by tensor.

    Weights that begin at zero, as an adapter's, are moved all the same: else rounding would be all there is.
    """
    generator = torch.Generator().manual_seed(seed)
    local = [_local(w.detach()).data for w in weights]  # data: the caller's pending backward must not notice
    step = [
        torch.randn(w.shape, generator=generator, dtype=w.dtype).to(w.device)
        * (w.norm() / max(1, w.numel()) ** 0.5).clamp_min(_LEAST)
        for w in local
    ]
    before, values = [w.clone() for w in local], []
    try:
        for sign in (1.0, -1.0):
            for w, s, home in zip(local, step, before, strict=True):
                w.copy_(home).add_(s, alpha=sign * length)
            reshard()
            values.append(float(reading().detach()))
    finally:
        for w, home in zip(local, before, strict=True):
            w.copy_(home)
        reshard()
    found = (values[0] - values[1]) / (2 * length)
    pairs = [(_local(g), s) for g, s in zip(gradient, step, strict=True)]
    claimed = _total(_sum([(g * s).sum().double() for g, s in pairs]), weights)
    sizes = _total(_sum([(g.norm() * s.norm()).double() for g, s in pairs]), weights)
    scale = max(abs(found), abs(claimed), 1e-2 * sizes)
    return abs(found - claimed) / scale if scale else 0.0


def _local(x: Tensor) -> Tensor:
    """This process's share of a sharded tensor, others as they are."""
    found: Tensor = x.to_local() if hasattr(x, "to_local") else x
    return found


def _total(x: Tensor, weights: Sequence[Tensor]) -> float:
    """The sum over all processes where the weights are sharded among them."""
    if any(hasattr(w, "to_local") for w in weights):
        torch.distributed.all_reduce(x)
    return float(x)


def _along(a: Sequence[Tensor], b: Sequence[Tensor]) -> Tensor:
    return _sum([(x * y).sum() for x, y in zip(a, b, strict=True)])


def _sum(numbers: Sequence[Tensor]) -> Tensor:
    """Of a model that lies on several devices too."""
    return torch.stack([n.to(numbers[0].device) for n in numbers]).sum()


def _size(tensors: Sequence[Tensor]) -> float:
    return float(_total(_sum([_local(t).double().square().sum() for t in tensors]), tensors) ** 0.5)
