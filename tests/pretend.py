"""A device that isn't there: its tensors compute on the CPU, and refuse to meet the CPU's own.

``with pretended():`` torch's ``meta`` device plays an accelerator. Tensors moved there hold values, unlike
meta tensors elsewhere. An operation that brings one of them together with a tensor of the CPU raises what
CUDA would raise, with the exceptions that CUDA knows: copies, indices, and tensors without dimensions.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

DEVICE = torch.device("meta")
_JOINING = {"aten::stack", "aten::cat"}
_MIXED = {"aten::_to_copy", "aten::copy_", "aten::index", "aten::index_put", "aten::index_put_",
          "aten::_index_put_impl_", "aten::_unsafe_index", "aten::set_"}  # fmt: skip


class There(Tensor):
    """A tensor on the pretended device; ``inner`` holds its values on the CPU."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor, requires_grad: bool = False) -> There:
        made = torch.Tensor._make_wrapper_subclass(
            cls, inner.shape, strides=inner.stride(), storage_offset=inner.storage_offset(),
            dtype=inner.dtype, layout=inner.layout, device=DEVICE, requires_grad=requires_grad,
        )  # fmt: skip
        made.inner = inner
        return made

    def __repr__(self) -> str:  # type: ignore[override]
        return f"There({self.inner!r})"

    @property
    def data(self) -> Tensor:  # type: ignore[override]
        return self.detach()

    @data.setter
    def data(self, new: There) -> None:
        self.inner = new.inner

    def tolist(self) -> Any:  # type: ignore[override]
        return self.inner.tolist()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _computed(func, args, kwargs or {})


class _Creating(TorchDispatchMode):
    """Tensors that are made on the pretended device, or moved there."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _computed(func, args, kwargs or {})


def _computed(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    flat = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, Tensor)]
    there, name = [x for x in flat if isinstance(x, There)], func._schema.name
    wanted = kwargs.get("device")
    goes = wanted is not None and torch.device(wanted) == DEVICE
    alone = name in _JOINING  # take no numbers of another device, where most others do
    if there and name not in _MIXED and any(not isinstance(x, There) and (x.ndim or alone) for x in flat):
        raise RuntimeError(f"Expected all tensors to be on the same device, but found meta and cpu ({name})")
    if not there and not goes:
        return func(*args, **kwargs)
    if goes and kwargs.get("generator") is not None:
        raise RuntimeError(f"Expected a 'meta' device type for generator but found 'cpu' ({name})")
    if goes:
        kwargs = {**kwargs, "device": torch.device("cpu")}
    plain_args, plain_kwargs = tree_map(lambda x: x.inner if isinstance(x, There) else x, (args, kwargs))
    if name == "aten::_to_copy" and goes and not there:  # a copy, so that the two don't share memory
        plain_args = (plain_args[0].clone(), *plain_args[1:])
    out = func(*plain_args, **plain_kwargs)
    if func._schema.is_mutable:
        return _same(func, args, kwargs, out)
    leaves = wanted is not None and not goes
    return out if leaves else tree_map(lambda x: There(x) if type(x) is Tensor else x, out)


def _same(func: Any, args: Any, kwargs: dict[str, Any], out: Any) -> Any:
    """What was written into, itself, as torch returns it."""
    written = [
        value
        for i, a in enumerate(func._schema.arguments)
        if a.alias_info is not None and a.alias_info.is_write
        for value in [args[i] if i < len(args) else kwargs.get(a.name)]
    ]
    if len(func._schema.returns) == 0:
        return None
    if all(r.alias_info is not None for r in func._schema.returns):
        return written[0] if len(func._schema.returns) == 1 else tuple(written)
    return tree_map(lambda x: There(x) if type(x) is Tensor else x, out)


@contextmanager
def pretended() -> Iterator[str]:
    """Within, the device that this yields the name of computes."""
    autocast, enabled = torch.autocast, torch.is_autocast_enabled

    def cast(device_type: str, *args: Any, **kwargs: Any) -> Any:
        return autocast("cpu" if device_type == DEVICE.type else device_type, *args, **kwargs)

    def is_enabled(device_type: str = "cpu") -> bool:
        return enabled("cpu" if device_type == DEVICE.type else device_type)

    before = torch.__future__.get_overwrite_module_params_on_conversion()
    torch.__future__.set_overwrite_module_params_on_conversion(True)  # else .double() writes past ``inner``
    try:
        with (
            mock.patch.object(torch, "autocast", cast),
            mock.patch.object(torch, "is_autocast_enabled", is_enabled),
            _Creating(),
        ):
            yield DEVICE.type
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(before)
