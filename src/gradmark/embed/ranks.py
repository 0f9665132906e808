"""Several processes that train one model: the same carriers for all, and each its share of the work.

Every process has the same carriers, gathered from the batches of all, the same generator and the same
scores, so all come to the same penalty and the same running state, which is that of a single process on
the joint batch. Where nothing couples the inputs, each passes its share of the rows through the
model and gets the other scores from the others; the averaging of DDP and FSDP2 then makes the gradient
whole. With batch norms in training, for double backward, and on the rare steps that look at
gradient norms every process does all the work.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from gradmark.protocols import Batch
from gradmark.scores import wide
from gradmark.suspects.checks import unwrap


@dataclass(frozen=True)
class Ranks:
    """This process's number among ``size``; every one of them calls the same methods in the same order."""

    rank: int = 0
    size: int = 1

    @classmethod
    def here(cls) -> Ranks:
        """The default process group, or a single process where there is none."""
        if dist.is_available() and dist.is_initialized():
            return cls(dist.get_rank(), dist.get_world_size())
        return cls()

    def gathered(self, batch: Batch, carriers: int) -> Batch:
        """``carriers`` inputs and their targets, as many from each process's batch, without a gradient."""
        x, targets = batch
        if self.size == 1:
            return x[:carriers].detach(), targets[:carriers]
        least = torch.tensor(min(len(x), -(-carriers // self.size)), device=x.device)
        dist.all_reduce(least, dist.ReduceOp.MIN)
        return self._all(x[: int(least)].detach()), self._all(targets[: int(least)])

    def agreed(self, running: dict[str, Tensor], numbers: list[float], like: Tensor) -> dict[str, Any]:
        """Process 0's ``running`` rows and ``numbers``, by way of the device of ``like``."""
        rows = [*running.values(), torch.tensor(numbers, dtype=torch.float64)]
        moved = torch.cat(rows).to(like.device)
        dist.broadcast(moved, 0)
        *kept, told = moved.to(rows[0].device).split([len(row) for row in rows])
        return {**dict(zip(running, kept, strict=True)), "numbers": told.tolist()}

    @contextmanager
    def sharing(self, model: nn.Module, able: bool) -> Iterator[None]:
        """Within, every call of ``model`` is shared out by rows; its answer is the scores of all rows.

        ``able``: whether the caller allows it. A gradient counts for what the average over all processes
        makes of it. Batch norms in training see all rows or none, so such models aren't shared out.
        """
        norms = any(m.training and isinstance(m, _NormBase) for m in model.modules())
        if self.size == 1 or norms or not able:
            yield
            return
        rows: list[int] = []

        def cut(_: nn.Module, given: tuple[Any, ...]) -> tuple[Any, ...]:
            n, per = len(given[0]), -(-len(given[0]) // self.size)
            rows.append(n)
            own = (torch.arange(per, device=given[0].device) + self.rank * per).clamp_max(n - 1)
            return (given[0][own], *given[1:])

        def join(_: nn.Module, __: tuple[Any, ...], out: Any) -> Tensor:
            own = wide(unwrap(out))
            parts = [torch.empty_like(own) for _ in range(self.size)]
            dist.all_gather(parts, own.detach().contiguous())
            if own.requires_grad:
                own = own.view_as(own)
                own.register_hook(lambda gradient: gradient * self.size)
            parts[self.rank] = own
            return torch.cat(parts)[: rows.pop()]

        handles = [model.register_forward_pre_hook(cut), model.register_forward_hook(join)]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _all(self, own: Any) -> Any:
        if not isinstance(own, Tensor):  # a task's targets may be anything that has rows
            lists: list[Any] = [None] * self.size
            dist.all_gather_object(lists, list(own))
            return [row for rows in lists for row in rows]
        parts = [torch.empty_like(own, memory_format=torch.contiguous_format) for _ in range(self.size)]
        dist.all_gather(parts, own.contiguous())
        return torch.cat(parts)
