"""A live ``nn.Module`` as a suspect: scores and input gradients, and nothing in it changes."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from gradmark.errors import GradmarkError, ModelError
from gradmark.suspects.checks import brief, check_inputs, check_scores, rnns_without_cudnn, unwrap


class ModuleSuspect:
    """White-box access to ``module``, which is read in eval mode and left as it was found.

    Training flags, gradients, buffers and the random state are the same after a reading as before
    it, also when the reading fails. ``batch_size`` bounds the inputs in one forward pass. ``price``,
    ``entry``: what an API that stands for it would count (:class:`gradmark.views.Asked`).
    """

    price = 1
    entry = 0

    def __init__(
        self,
        module: nn.Module,
        *,
        name: str = "live module",
        digest: str | None = None,
        batch_size: int = 256,
    ) -> None:
        self.module = module
        self.name = name
        self.digest = digest if digest is not None else weights_digest(module)
        self.batch_size = batch_size
        self._n_classes: int | None = None

    def __repr__(self) -> str:
        return f"ModuleSuspect({type(self.module).__name__}, name={self.name!r})"

    def query(self, x: Tensor) -> Tensor:
        """Scores (b, C), float32 on the CPU, of inputs (b, *shape).

        Raises ModelError on a failing forward pass and on NaN or wrongly shaped scores, DataError
        on inputs that aren't finite.
        """
        x = check_inputs(x, self.name)
        with torch.inference_mode(False), torch.no_grad(), undisturbed(self.module):
            return torch.cat(
                [self._check(self._forward(part), part) for part in torch.split(x, self.batch_size)]
            )

    def vjp(self, x: Tensor, v: Tensor) -> Tensor:
        """Gradient (b, *shape), float32 on the CPU, of ``(scores(x) * v).sum()``; v is (b, C).

        Works under an outer ``torch.no_grad`` or ``torch.inference_mode``. Raises ModelError where
        the scores don't depend differentiably on the input.
        """
        x = check_inputs(x, self.name)
        if v.ndim != 2 or v.shape[0] != x.shape[0]:
            found = str(tuple(v.shape))
            raise ModelError(
                "The weights of the scores don't fit", expected=f"({x.shape[0]}, C)", found=found
            )
        with torch.inference_mode(False), torch.enable_grad(), undisturbed(self.module):
            parts = zip(
                torch.split(x, self.batch_size), torch.split(v.detach(), self.batch_size), strict=True
            )
            return torch.cat([self._gradient(x_part, v_part) for x_part, v_part in parts])

    def weights(self, *, buffers: bool = False) -> dict[str, Tensor]:
        """Every parameter by name, in the module's order: float32 copies on the CPU.

        ``buffers``: the floating-point ones too, behind the parameters.
        """
        found: dict[str, Tensor] = dict(self.module.named_parameters())
        if buffers:
            found |= {n: b for n, b in self.module.named_buffers() if b.is_floating_point()}
        with torch.no_grad():
            return {n: p.detach().dequantize().to("cpu", torch.float32, copy=True) for n, p in found.items()}

    def _gradient(self, x: Tensor, v: Tensor) -> Tensor:
        like = _dtype_device(self.module)
        # clone: the caller's tensor may be an inference tensor, and must not become a leaf of ours
        x = x.to(device=like.device, dtype=like.dtype).clone().requires_grad_(True)
        out = unwrap(self._forward(x))
        checked = self._check(out, x)
        # scores that are no tensor (a numpy array, lists) have no gradient: refused below
        scores = out if isinstance(out, Tensor) else checked
        if v.shape[1] != scores.shape[1]:
            found = f"{v.shape[1]} weights for {scores.shape[1]} classes"
            raise ModelError(
                "The weights of the scores don't fit the model", expected="one per class", found=found
            )
        grad: Tensor | None = None
        if scores.requires_grad:
            weights = v.to(device=scores.device, dtype=scores.dtype).clone()
            try:
                (grad,) = torch.autograd.grad(scores, x, grad_outputs=weights, allow_unused=True)
            except RuntimeError as cause:
                raise ModelError(f"{self.name} has no input gradient", found=brief(cause)) from cause
        if grad is None:
            raise ModelError(
                f"{self.name} has no input gradient",
                expected="scores that depend differentiably on the input",
                found="scores cut off from it (integer or quantised operations, or a detach)",
                fix="Read it with --access black",
            )
        grad = grad.detach().to(device="cpu", dtype=torch.float32)
        if not bool(torch.isfinite(grad).all()):
            raise ModelError(
                f"{self.name} has an input gradient that isn't finite", expected="finite numbers"
            )
        return grad

    def _forward(self, x: Tensor) -> object:
        x = fed(self.module, x)
        try:
            return self.module(x)
        except GradmarkError:
            raise
        except Exception as cause:  # whatever a stranger's forward raises, the user needs one sentence
            raise ModelError(
                f"{self.name} fails on inputs of shape {tuple(x.shape)}",
                found=brief(cause),
                fix="Check that the data fits the model",
            ) from cause

    def _check(self, out: object, x: Tensor) -> Tensor:
        scores = check_scores(out, x.shape[0], self._n_classes, self.name)
        self._n_classes = scores.shape[1]
        return scores


@contextmanager
def undisturbed(module: nn.Module) -> Iterator[None]:
    """Eval mode inside; training flags, buffers and random state restored after, come what may."""
    flags = [(part, part.training) for part in module.modules()]
    was_training = module.training
    moved = any(flag for _, flag in flags)
    buffers = [
        (part, name, buffer, buffer.detach().clone())
        for part in module.modules()
        for name, buffer in part._buffers.items()
        if buffer is not None
    ]
    like = _dtype_device(module)
    devices = [like.device] if like.device.type == "cuda" else []
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=devices))
        stack.enter_context(rnns_without_cudnn(module))
        try:
            if moved:
                _set_mode(module, False)
            yield
        finally:
            if moved:
                _set_mode(module, was_training)
                for part, flag in flags:
                    part.training = flag
            with torch.no_grad():
                for part, name, buffer, copy in buffers:
                    part._buffers[name] = buffer
                    # written back only where it moved: a write would spoil a caller's pending backward
                    if not _same(buffer, copy):
                        buffer.copy_(copy)


def weights_digest(module: nn.Module) -> str:
    """``sha256:<hex>`` over the sorted names, dtypes, shapes and bytes of the state dict."""
    total = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        for part in _plain(value.detach().cpu()) if isinstance(value, Tensor) else ():
            total.update(f"{name}\0{part.dtype}\0{tuple(part.shape)}\0".encode())
            total.update(part.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return "sha256:" + total.hexdigest()


def _plain(value: Tensor) -> Iterator[Tensor]:
    """The ordinary tensors that hold ``value``: torchao's weights consist of several."""
    if hasattr(value, "__tensor_flatten__"):
        for name in value.__tensor_flatten__()[0]:
            yield from _plain(getattr(value, name))
    else:
        yield value.int_repr() if value.is_quantized else value


def _same(a: Tensor, b: Tensor) -> bool:
    """Equal bit for bit as far as a reading could have changed it; NaN equals NaN."""
    if a.is_floating_point() and not a.is_quantized:
        return bool(torch.equal(torch.nan_to_num(a), torch.nan_to_num(b))) and bool(
            torch.equal(a.isnan(), b.isnan())
        )
    return bool(torch.equal(a, b))


def _set_mode(module: nn.Module, training: bool) -> None:
    """``module.train(training)``, or the bare flags where an exported module refuses that."""
    try:
        module.train(training)
    except NotImplementedError:
        for part in module.modules():
            part.training = training


def fed(module: nn.Module, x: Tensor) -> Tensor:
    """``x`` on the device of ``module``, and in its precision where it isn't whole numbers."""
    like = _dtype_device(module)
    return x.to(like.device, like.dtype if x.is_floating_point() else x.dtype)


def _dtype_device(module: nn.Module) -> Tensor:
    """A floating tensor of the module whose dtype and device its inputs should have."""
    for tensor in (*module.parameters(), *module.buffers()):
        if tensor.is_floating_point() and tensor.dtype in (
            torch.float16,
            torch.bfloat16,
            torch.float32,
            torch.float64,
        ):
            return tensor
    return torch.empty(0)
