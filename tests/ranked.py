"""One process of several that train and mark the same small network; also run alone, to compare with.

    RANK=0 WORLD_SIZE=2 MASTER_ADDR=127.0.0.1 MASTER_PORT=29500 python tests/ranked.py OUT CASE [CASE ...]

Writes ``OUT/CASE-RANK.pt``: the first step's gradients, the weights after some steps, the losses and the
marker's state, or the words of a refusal. ``GLOBAL`` inputs make a batch; every process has its part.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from conformance import KEY, SPECS, inputs, network, scheme_for
from gradmark.embed import Marker
from gradmark.errors import PreflightError

GLOBAL, CARRIERS, STEPS = 64, 24, 12


class Checkpointed(nn.Module):
    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.body, self.reentrant = network("vector"), reentrant

    def forward(self, x: Tensor) -> Tensor:
        return self.body[1:](checkpoint(self.body[0], x.requires_grad_(), use_reentrant=self.reentrant))


class Normed(nn.Module):
    """A batch norm in front of the last layers; ``training`` decides what it normalises by."""

    def __init__(self) -> None:
        super().__init__()
        body = network("vector")
        self.body = nn.Sequential(*body[:-1], nn.BatchNorm1d(64), body[-1])

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


def ddp(model: nn.Module, **more: Any) -> nn.Module:
    return nn.parallel.DistributedDataParallel(model, **more) if dist.is_initialized() else model


def fsdp2(model: nn.Module) -> nn.Module:
    if dist.is_initialized():
        from torch.distributed.fsdp import fully_shard

        for part in (model[0], model[2]):
            fully_shard(part)
        fully_shard(model)
    return model


def fsdp1(model: nn.Module) -> nn.Module:
    from torch.distributed.fsdp import FullyShardedDataParallel

    return FullyShardedDataParallel(model, device_id=torch.device("cpu"))


CASES: dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]] = {
    "ddp": (lambda: ddp(network("vector")), {}),
    "ddp-exact": (lambda: ddp(network("vector", activation=nn.Tanh)), {"method": "exact"}),
    "ddp-static-graph": (lambda: ddp(network("vector"), static_graph=True), {}),
    "ddp-compiled": (lambda: torch.compile(ddp(network("vector")), backend="aot_eager"), {}),
    "ddp-checkpointing": (lambda: ddp(Checkpointed(False)), {}),
    "ddp-reentrant": (lambda: ddp(Checkpointed(True)), {}),
    "ddp-ensemble": (lambda: ddp(network("vector")), {"scheme": "ensemble"}),
    "ddp-batch-norm": (lambda: ddp(Normed()), {"penalty_only": True}),
    "ddp-rehearsal": (lambda: ddp(network("vector")), {"scheme": "ensemble", "rehearse": 0.01}),
    "fsdp2": (lambda: fsdp2(network("vector")), {}),
    "fsdp2-ensemble": (lambda: fsdp2(network("vector")), {"scheme": "ensemble"}),
    "ddp-softened": (lambda: ddp(network("grey")), {"domain": "grey", "soften": 0.3}),
    "fsdp2-softened": (lambda: fsdp2(network("grey")), {"domain": "grey", "soften": 0.3}),
    "fsdp1": (lambda: fsdp1(network("vector")), {}),
}


def part(domain: str, step: int, rank: int, size: int) -> tuple[Tensor, Tensor]:
    """This process's inputs of a step: its share of the carriers, then its share of the others."""
    x, labels = inputs(domain, 512, seed=0)
    rows = torch.randperm(len(x), generator=torch.Generator().manual_seed(step))[:GLOBAL]
    own = torch.cat([rows[:CARRIERS].chunk(size)[rank], rows[CARRIERS:].chunk(size)[rank]])
    return x[own], labels[own]


def full(tensor: Tensor) -> Tensor:
    found = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return found.detach().clone()


def run(case: str, rank: int, size: int) -> dict[str, Any]:
    make, more = CASES[case]
    more = dict(more)
    only, scheme = more.pop("penalty_only", False), more.pop("scheme", "filter-gradient")
    domain = more.pop("domain", "vector")
    model = make().train()
    marker = Marker(scheme_for(scheme, domain), KEY, SPECS[domain], every=2, carriers=CARRIERS, **more)
    marker._begun = lambda: True  # so few steps place nothing, and a rehearsal would wait
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    found: dict[str, Any] = {"losses": []}
    for step in range(STEPS):
        x, labels = part(domain, step, rank, size)
        task = F.cross_entropy(model(x.clone()), labels)
        loss = (0 * task if only else task) + marker.penalty(model, (x, labels))
        optimizer.zero_grad()
        loss.backward()
        if not step:
            found["gradients"] = [full(p.grad) for p in model.parameters()]
        optimizer.step()
        found["losses"].append(float(loss.detach()))
    found["weights"] = [full(p) for p in model.parameters()]
    return found | {"state": marker.state_dict(), "method": marker.method}


def main() -> None:
    torch.set_num_threads(1)
    out, cases = Path(sys.argv[1]), sys.argv[2:]
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group("gloo")
    for case in cases:
        try:
            found = run(case, rank, size)
        except PreflightError as refusal:
            found = {"refused": str(refusal)}
        torch.save(found, out / f"{case}-{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
