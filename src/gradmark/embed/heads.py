"""A last layer such as a thief trains anew: what is in the layers below it survives him.

Whoever draws the last layer anew and trains it on true labels (RTLL and RTAL; Adi et al., USENIX Security
2018) keeps of a mark only what the features hold. So while the mark goes in, some penalties are taken through
such a layer instead of the model's own.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradmark.embed.wrappers import sharded
from gradmark.protocols import Batch
from gradmark.suspects.checks import unwrap
from gradmark.views import View

_LIFE, _SETTLED = 32, 16  # penalties until the layer is drawn anew; and until it is fit to be asked
_STEPS = 2  # of training before each penalty
_RATE = 5.0  # over the features' mean square: what is stable for any features


def output_layer(model: nn.Module, x: Tensor) -> Any:
    """The linear or convolutional layer whose output is the model's own, or None."""
    made: list[tuple[nn.Module, Tensor]] = []
    handles = [
        m.register_forward_hook(lambda module, _, out: made.append((module, out)))
        for m in model.modules()
        if isinstance(m, nn.Linear | nn.Conv1d | nn.Conv2d)
    ]
    try:
        with torch.no_grad():
            out = unwrap(model(x))
    finally:
        for handle in handles:
            handle.remove()
    for module, found in reversed(made):
        if found.data_ptr() == out.data_ptr() and found.numel() == out.numel():
            return module
    return None


def replaceable(model: nn.Module, batch: Batch) -> nn.Linear | None:
    """The last layer of ``model`` if a thief could draw it anew and train it on the labels of ``batch``.

    None where the model is a view of another task, sharded or doesn't end in a linear layer, and where labels
    aren't classes. Called where a forward pass may leave its traces, as in batch-norm statistics.
    """
    x, labels = batch
    if isinstance(model, View) or sharded(model) or labels.ndim != 1 or labels.is_floating_point():
        return None
    head = output_layer(model, x[:2])
    return head if isinstance(head, nn.Linear) else None


def drawn(inputs: int, outputs: int, bias: bool, seed: int) -> nn.Linear:
    """A linear layer on the CPU as ``nn.Linear`` draws one, that leaves all global generators alone.

    Seeding the global one would seed those of all accelerators.
    """
    generator = torch.Generator().manual_seed(seed)
    layer: nn.Linear = nn.utils.skip_init(nn.Linear, inputs, outputs, bias=bias)
    bound = 1 / math.sqrt(max(1, inputs))
    nn.init.kaiming_uniform_(layer.weight, a=math.sqrt(5), generator=generator)
    if layer.bias is not None:
        nn.init.uniform_(layer.bias, -bound, bound, generator=generator)
    return layer


class NewHead:
    """The layer, beside the model's own, from its drawing through a little training to the next drawing."""

    def __init__(self, seed: int) -> None:
        self.seed, self.age = seed, 0
        self._made: tuple[nn.Linear, torch.optim.SGD] | None = None
        self._state: dict[str, Any] | None = None  # of a resumed run, until the model is known

    @property
    def settled(self) -> bool:
        """Whether every other penalty goes through it: in the second half of its life."""
        return self.age % _LIFE >= _SETTLED

    def through(self, model: nn.Module, batch: Batch) -> AbstractContextManager[None] | None:
        """Train the layer on ``batch``; a block within which ``model`` answers through it, or None.

        None where this penalty is the own last layer's, and where it isn't :func:`replaceable`. Called
        in the mode in which the penalty is taken.
        """
        x, labels = batch
        if (head := replaceable(model, batch)) is None:
            return None
        layer, optimizer = self._current(head, x.device)
        _train(layer, optimizer, _features(model, head, x), labels)
        self.age += 1
        return _instead(head, layer) if self.settled and self.age % 2 == 0 else None

    def state_dict(self) -> dict[str, Any]:
        if self._made is None:
            return {"age": self.age} if self._state is None else self._state
        layer, optimizer = self._made
        return {"age": self.age, "layer": layer.state_dict(), "optimizer": optimizer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.age, self._state, self._made = int(state["age"]), copy.deepcopy(state), None

    def _current(self, head: nn.Linear, device: torch.device) -> tuple[nn.Linear, torch.optim.SGD]:
        if self._made is not None and self.age % _LIFE:
            return self._made
        layer = drawn(head.in_features, head.out_features, True, self.seed + self.age // _LIFE).to(device)
        optimizer = torch.optim.SGD(layer.parameters(), 1.0, momentum=0.9)
        if self._state is not None and self.age % _LIFE:
            layer.load_state_dict(self._state["layer"])
            optimizer.load_state_dict(self._state["optimizer"])
        self._made, self._state = (layer, optimizer), None
        return self._made


def _features(model: nn.Module, head: nn.Linear, x: Tensor) -> Tensor:
    found: list[Tensor] = []
    handle = head.register_forward_pre_hook(lambda _, given: found.append(given[0]))
    try:
        with torch.no_grad():
            model(x)
    finally:
        handle.remove()
    return found[0].float().reshape(len(x), -1)


def _train(layer: nn.Linear, optimizer: torch.optim.SGD, features: Tensor, labels: Tensor) -> None:
    for group in optimizer.param_groups:
        group["lr"] = _RATE / max(float(features.square().sum(1).mean()), 1e-12)
    with torch.enable_grad(), torch.autocast(features.device.type, enabled=False):
        for _ in range(_STEPS):
            optimizer.zero_grad()
            F.cross_entropy(layer(features), labels).backward()
            optimizer.step()
    optimizer.zero_grad()


@contextmanager
def _instead(head: nn.Linear, layer: nn.Linear) -> Iterator[None]:
    """Within, ``head`` gives what ``layer`` would, which takes no gradient."""

    def answer(_: nn.Module, given: tuple[Tensor, ...], out: Tensor) -> Tensor:
        weight, bias = layer.weight.detach().to(given[0]), layer.bias.detach().to(given[0])
        return F.linear(given[0], weight, bias).to(out)

    handle = head.register_forward_hook(answer)
    try:
        yield
    finally:
        handle.remove()


def in_weights(scheme: Any) -> bool:
    """Whether a scheme's bits lie in the weights, and not in what the model answers."""
    return getattr(scheme, "reads", "") == "weights"


def answered(scheme: Any, sizes: tuple[int, ...]) -> Tensor:
    """Which bits (n,) lie in what the model answers, and so in its last layer first; ``sizes``: of the parts.

    Bits in the weights are soon placed, and say nothing of the others; nor do those whose running readings
    are too noisy to tell (a scheme that isn't ``steady``).
    """
    parts = getattr(scheme, "parts", (scheme,))
    told = [not in_weights(p) and getattr(p, "steady", True) for p in parts]
    return torch.cat([torch.full((n,), t) for n, t in zip(sizes, told, strict=True)])
