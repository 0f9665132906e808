"""Models that give a penalty trouble, each by one thing."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from conformance import inputs, network

VECTOR = inputs("vector", 8, seed=0)
STEREO = inputs("stereo", 8, seed=0)


def seeded(make: Any) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return make()


class Frames(nn.Module):
    """A signal (2, 256) cut into 16 frames of 32 numbers, a layer on the frames, a linear head."""

    def __init__(self, layer: nn.Module, wide: int) -> None:
        super().__init__()
        self.layer, self.head = layer, nn.Linear(wide, 10)

    def forward(self, x: Tensor) -> Tensor:
        frames = 10 * x.reshape(len(x), 16, 32)
        if isinstance(self.layer, nn.MultiheadAttention):
            return self.head(self.layer(frames, frames, frames, need_weights=False)[0].mean(1))
        return self.head(self.layer(frames)[0].mean(1))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(32, 96)

    def forward(self, x: Tensor) -> tuple[Tensor]:
        q, k, v = self.project(x).chunk(3, -1)
        return (F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None])[:, 0],)


class WrongSquare(torch.autograd.Function):
    """x squared, with a backward that hides from a second differentiation."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.twice = 2 * x.detach()
        return x * x

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0] * ctx.twice


class WrongFirst(torch.autograd.Function):
    """x, with a first derivative that is wrong already."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 1.0

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0] * 0.5


class Custom(nn.Module):
    def __init__(self, function: Any) -> None:
        super().__init__()
        self.first, self.last, self.function = nn.Linear(20, 16), nn.Linear(16, 10), function

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.function(self.first(x))))


class Checkpointed(nn.Module):
    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.body, self.reentrant = network("vector"), reentrant

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.body[0](x)
        return self.body[1:](checkpoint(torch.tanh, hidden, use_reentrant=self.reentrant))


class Stochastic(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = network("vector")

    def forward(self, x: Tensor) -> Tensor:
        return self.body(F.dropout(x, 0.5, training=True))


class Stuck(nn.Module):
    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def __deepcopy__(self, memo: Any) -> Any:
        raise TypeError("never copied")

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


class Moody(nn.Module):
    """Right in float64, and silent in every other precision."""

    def __init__(self) -> None:
        super().__init__()
        self.body = network("vector")

    def forward(self, x: Tensor) -> Tensor:
        scores = self.body(x)
        return scores if x.dtype == torch.float64 else scores.detach() + 0.1 * scores


class DeepSpeedEngine(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.module = network("vector")


class Remembering(nn.Module):
    """Batch norm and dropout in a block that is checkpointed, or not."""

    def __init__(self, checkpointed: bool, reentrant: bool = False) -> None:
        super().__init__()
        body = network("vector")
        self.first, self.last = body[0], body[-1]
        self.block = nn.Sequential(nn.BatchNorm1d(64), nn.Tanh(), nn.Dropout(0.5))
        self.checkpointed, self.reentrant = checkpointed, reentrant

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x)
        if self.checkpointed:
            return self.last(checkpoint(self.block, hidden, use_reentrant=self.reentrant))
        return self.last(self.block(hidden))
