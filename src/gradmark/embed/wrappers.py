"""What surrounds a model: wrappers that the penalty looks through, and those that can't be marked.

Wrappers are told by the names of their classes, so that none of their libraries is imported here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from gradmark.errors import PreflightError
from gradmark.suspects.checks import has_rnn, rnns_without_cudnn
from gradmark.views import View

REENTRANT = "CheckpointFunctionBackward"


def bare(model: nn.Module) -> nn.Module:
    """The module inside DDP, DataParallel and ``torch.compile``, which the penalty asks directly.

    Its gradients meet the task's in the weights, before DDP reduces them: right in one backward pass
    with the task's loss, with ``static_graph`` too. Raises PreflightError on FSDP1 and DeepSpeed.
    """
    while True:
        refuse(model)
        if isinstance(model, DistributedDataParallel | DataParallel):
            model = model.module
        elif _is(model, "OptimizedModule"):
            model = model._orig_mod  # type: ignore[assignment]
        elif isinstance(model, View) and (inner := bare(model.model)) is not model.model:
            return _viewed(model, inner)
        else:
            return model


def _viewed(view: View, inner: nn.Module) -> View:
    """A view of ``inner``, whose parts stay in the modes they are in."""
    modes = [(part, part.training) for part in inner.modules()]
    found = View(view.task, inner)
    for part, training in modes:
        part.training = training
    return found


def refuse(model: nn.Module) -> None:
    """Raises PreflightError on wrappers under which no penalty can be right, with what to do instead."""
    if any(_is(part, "FullyShardedDataParallel") for part in model.modules()):
        raise PreflightError(
            "The model is wrapped in FSDP1, whose flat parameters are freed between two forward passes",
            expected="FSDP2, DDP or a plain module",
            found="torch.distributed.fsdp.FullyShardedDataParallel",
            fix="Shard with torch.distributed.fsdp.fully_shard (FSDP2)",
        )
    if _is(model, "DeepSpeedEngine") or any(hasattr(p, "ds_id") for p in model.parameters()):
        raise PreflightError(
            "The model is under DeepSpeed, whose partitioned weights are empty outside its own passes",
            expected="FSDP2, DDP or a plain module",
            found="a DeepSpeed engine or ZeRO-3 weights",
            fix="Train with FSDP2, which shards the same way, while the mark goes in",
        )


def sharded(model: nn.Module) -> bool:
    """Whether FSDP2 shards some of the model."""
    return any(_is(part, "FSDPModule") for part in model.modules())


def reshard(model: nn.Module) -> None:
    """Let FSDP2 forget the gathered weights, which it keeps after a forward pass without a backward one."""
    for part in model.modules():
        if _is(part, "FSDPModule"):
            part.reshard()  # type: ignore[operator]


def trainable(model: nn.Module) -> list[nn.Parameter]:
    """The weights that training changes; of FSDP2 the shards, whatever is gathered at the moment."""
    reshard(model)
    return [p for p in model.parameters() if p.requires_grad]


def compiled(model: nn.Module) -> bool:
    """Whether ``torch.compile`` has taken hold of some of the model."""
    return any(
        _is(part, "OptimizedModule") or getattr(part, "_compiled_call_impl", None) is not None
        for part in model.modules()
    )


@contextmanager
def plain_kernels(model: nn.Module, exact: bool) -> Iterator[None]:
    """Kernels that differentiate as ``exact`` wants it, twice: attention by its formula, RNNs step by step.

    For either method, compiled parts run as they were written, since a compiled graph neither sees the
    hooks by which triggers are read beside natural inputs nor has a second derivative, and RNNs run
    without cuDNN, whose have no backward pass in evaluation mode.
    """
    with ExitStack() as stack:
        if compiled(model):
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(rnns_without_cudnn(model))
        if exact:
            from torch.nn.attention import SDPBackend, sdpa_kernel

            stack.enter_context(sdpa_kernel(SDPBackend.MATH))
            if has_rnn(model):
                stack.enter_context(_without_onednn())
        yield


@contextmanager
def _without_onednn() -> Iterator[None]:
    """As ``torch.backends.mkldnn.flags(enabled=False)``, which warns of tf32 on machines without it."""
    flags: Any = torch.backends.mkldnn.set_flags
    before, *_ = flags(False, None, None, None)
    try:
        yield
    finally:
        flags(before, None, None, None)


def weight_gradients(
    loss: Tensor, weights: Sequence[nn.Parameter], *, whole: bool, retain: bool = False
) -> list[Tensor | None]:
    """The gradients of ``loss``; ``weights`` keep their ``grad``.

    ``whole`` runs a backward pass instead of ``torch.autograd.grad``, which reentrant checkpointing
    and FSDP2 don't allow.
    """
    if not whole:
        return list(torch.autograd.grad(loss, weights, allow_unused=True, retain_graph=retain))
    before = [w.grad for w in weights]
    try:
        for w in weights:
            w.grad = None
        loss.backward(retain_graph=retain)
        return [w.grad for w in weights]
    finally:
        for w, gradient in zip(weights, before, strict=True):
            w.grad = gradient


def norm_of(gradients: Sequence[Tensor | None]) -> float:
    """The norm of all gradients together, of whole ones where FSDP2 shards them."""
    norms = [g.float().norm() for g in gradients if g is not None]
    whole = [n.full_tensor() if hasattr(n, "full_tensor") else n for n in norms]
    if not whole:
        return 0.0
    return float(torch.stack([n.to(whole[0].device) for n in whole]).norm())  # a model may lie on several


class Given(torch.autograd.Function):
    """A value whose gradients are known: ``apply(value, *weights, *gradients)``."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, *given: Tensor | None) -> Tensor:
        ctx.gradients = given[len(given) // 2 :]
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> Any:
        known = [None if g is None else upstream[0].to(g) * g for g in ctx.gradients]
        return (None, *known, *(None for _ in known))


_LASTING: ContextVar[ExitStack | None] = ContextVar("lasting", default=None)


@contextmanager
def lasting() -> Iterator[None]:
    """A block in which a loss is made and its gradient taken.

    What a forward pass was given for its length stays until the end of the block, since what is checkpointed
    runs again in the backward pass.
    """
    with ExitStack() as stack:
        token = _LASTING.set(stack)
        try:
            yield
        finally:
            _LASTING.reset(token)


def block() -> ExitStack | None:
    """What the :func:`lasting` block around leaves behind it, if there is one."""
    return _LASTING.get()


def at_once(losses: Iterable[Tensor], model: nn.Module) -> tuple[Tensor, float]:
    """The sum of ``losses`` with its gradients taken already, and their norm.

    Each loss's graph is gone before the next loss is asked for. Not for FSDP2, which takes a gradient
    only in the step's own backward pass.
    """
    weights = trainable(model)
    total = torch.zeros(())
    gradients: list[Tensor | None] = [None for _ in weights]
    coming = iter(losses)
    while True:
        with lasting():
            if (loss := next(coming, None)) is None:
                break
            total = total.to(loss) + loss.detach()
            if not loss.requires_grad:
                continue
            more = weight_gradients(loss, weights, whole=needs_whole_backward(model, loss))
        del loss
        for i, known in enumerate(gradients):
            gradients[i], more[i] = _plus(known, more[i]), None
    found: Tensor = Given.apply(total, *weights, *gradients)  # type: ignore[no-untyped-call]
    return found, norm_of(gradients)


def _plus(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return b if a is None else a if b is None else a + b


def needs_whole_backward(model: nn.Module, output: Tensor) -> bool:
    """Whether ``torch.autograd.grad`` is out of the question."""
    return sharded(model) or REENTRANT in operations(output)[0]


def operations(output: Tensor) -> tuple[Counter[str], Counter[str]]:
    """How often each differentiable operation went into ``output``, and each custom Function of them."""
    names: Counter[str] = Counter()
    custom: Counter[str] = Counter()
    seen: set[Any] = set()
    todo: list[Any] = [output.grad_fn]
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        name = str(node.name())
        names[name] += 1
        written = getattr(type(node), "_forward_cls", None)  # a custom Function's own class
        if written is not None and not written.__module__.startswith("torch."):
            custom[name] += 1
        todo += [edge[0] for edge in node.next_functions]
    return names, custom


def _is(model: nn.Module, name: str) -> bool:
    return any(kind.__name__ == name for kind in type(model).__mro__)
