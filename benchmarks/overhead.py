"""What the flagship's penalty costs a training step: ResNet-20, BERT's and GPT-2's sizes, random weights.

    python benchmarks/overhead.py [resnet20 bert gpt2 bert-128 gpt2-128] [--rounds 5]

BERT and GPT-2 are timed on sequences of 16 tokens; their memory is measured on 128 as well.

Seconds are CPU seconds of one thread, since neighbours on the machine stretch all others. Plain steps and
each kind of step with a penalty (all parts, some of them, a look at gradient norms on every 16th) are timed
in turn, and ``ratio`` is that of a whole period of 16 penalties and the plain steps between them. Memory is the peak of the
resident set over that before the network was built, each side in a process of its own; the preflight
runs once before the first step and is given apart, for ResNet-20. Finished networks are kept: delete their file to repeat.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradmark import Marker, ModelSpec, OwnerKey, __version__, catalog
from gradmark.bench.networks import ResNet

RESULTS = Path(__file__).parent / "results" / "overhead"
BALANCE = 16  # penalties between two looks at the gradient norms
SETTINGS: dict[str, dict[str, Any]] = {
    "default": {"carriers": 32, "every": 4},
    "lean": {"carriers": 32, "every": 4, "lean": True},
    "shared": {"carriers": 32, "every": 4},
    "placed": {"carriers": 32, "every": 4, "lean": True, "ease": True},
    "placed, shared": {"carriers": 32, "every": 4, "ease": True},
}
ALL, PARTS = [0, 1, 2], {"filter": [0, 1], "trigger": [1, 2], "classes": [1]}
PERIOD = {
    "default": {"penalty": 15, "balance": 1},
    "lean": {"penalty": 15, "balance": 1},
    "shared": {"penalty": 15, "balance": 1},
    "placed": {"classes": 12, "trigger": 2, "filter": 1, "balance": 1},
    "placed, shared": {"classes": 12, "trigger": 2, "filter": 1, "balance": 1},
}
"""How often each kind of penalty comes in 16; ``placed``: filter and triggers are, wrong classes never are;
``shared``: the wrong classes' part reads the scores of the task's own forward pass."""


class Embedded(nn.Module):
    """A transformer that classifies sequences of embeddings, given as one vector each (b, length * width)."""

    def __init__(self, body: nn.Module, width: int, last: bool) -> None:
        super().__init__()
        self.body, self.head, self.width, self.last = body, nn.Linear(width, 10), width, last

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.body(inputs_embeds=x.reshape(len(x), -1, self.width)).last_hidden_state
        return self.head(hidden[:, -1 if self.last else 0])


def resnet20() -> nn.Module:
    return ResNet()


def bert() -> nn.Module:
    """BERT-base: 12 layers of 768, 86 million weights besides the word embeddings, which have no use here."""
    from transformers import BertConfig, BertModel

    return Embedded(BertModel(BertConfig(vocab_size=8)), 768, last=False)


def gpt2() -> nn.Module:
    """GPT-2's smallest: 12 layers of 768, causal."""
    from transformers import GPT2Config, GPT2Model

    return Embedded(GPT2Model(GPT2Config(vocab_size=8)), 768, last=True)


@dataclass(frozen=True)
class Case:
    """A network, its inputs, the batch, what the marker's carriers are cut by for smaller batches.

    ``sides``: the settings whose steps are timed; none where only memory is measured.
    """

    network: Callable[[], nn.Module]
    spec: ModelSpec
    batch: int
    share: int = 1
    sides: tuple[str, ...] = ("default", "shared", "placed, shared")

    def marker(self, side: str) -> Marker:
        given: dict[str, Any] = dict(SETTINGS[side])
        given["carriers"] //= self.share
        key, scheme = OwnerKey.from_seed(0), catalog.scheme("ensemble")
        return Marker(scheme, key, self.spec, method="central-difference", **given)


TOKENS, MORE = 16 * 768, 128 * 768
CASES = {
    "resnet20": Case(
        resnet20,
        ModelSpec("image", (3, 32, 32), 10, 0.0, 1.0, 255),
        128,
        sides=tuple(s for s in PERIOD if s != "lean"),
    ),
    "bert": Case(bert, ModelSpec("vector", (TOKENS,), 10), 8, share=16),
    "gpt2": Case(gpt2, ModelSpec("vector", (TOKENS,), 10), 8, share=16),
    "bert-128": Case(bert, ModelSpec("vector", (MORE,), 10), 8, share=16, sides=()),
    "gpt2-128": Case(gpt2, ModelSpec("vector", (MORE,), 10), 8, share=16, sides=()),
}


class Loop:
    """One training step at a time, with or without a penalty, which comes first."""

    def __init__(self, case: Case, side: str | None) -> None:
        torch.manual_seed(0)
        self.net = case.network().train()
        self.marker = None if side is None else case.marker(side)
        self.shares = side is not None and side.endswith("shared")
        self.placed = side is not None and side.startswith("placed")
        self.optimizer = torch.optim.SGD(self.net.parameters(), 1e-3, 0.9)
        self.x = torch.rand(case.batch, *case.spec.input_shape)
        self.y = torch.randint(0, 10, (case.batch,))

    def skip_preflight(self) -> None:
        assert self.marker is not None
        state = self.marker.state_dict()
        state["numbers"][1] = 1
        state["numbers"][3] = 1.0
        self.marker.load_state_dict(state)

    def step(self, kind: str) -> float:
        """CPU seconds of a step: plain, with all parts, with some, or with a look at gradient norms."""
        start = time.process_time()
        penalty, scores = None, self.net(self.x) if self.shares or kind == "plain" else None
        if kind != "plain":
            assert self.marker is not None
            state = self.marker.state_dict()
            state["numbers"][0] = 0
            state["numbers"][1] = BALANCE if kind == "balance" else 1
            self.marker.load_state_dict(state)
            if self.placed:  # so that a last layer is trained anew beside the model's own
                self.marker.evidence.readings = 2 * self.marker.margin * self.marker.evidence.limits
            self.marker._due = lambda *_: PARTS.get(kind, ALL)  # type: ignore[method-assign]
            penalty = self.marker.penalty(self.net, (self.x, self.y), scores)
        loss = F.cross_entropy(self.net(self.x) if scores is None else scores, self.y)
        if penalty is not None:
            loss = loss + penalty
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return time.process_time() - start


def seconds(case: Case, side: str, rounds: int) -> dict[str, Any]:
    """Medians of interleaved steps, and the ratio of a period."""
    loop = Loop(case, side)
    loop.step("plain")
    assert loop.marker is not None
    start = time.process_time()
    whole = side == "default" and case.share == 1
    if whole:
        loop.marker.penalty(loop.net, (loop.x, loop.y)).backward()
    else:
        loop.skip_preflight()
    first = {"first_call": time.process_time() - start} if whole else {}
    rows = [{kind: loop.step(kind) for kind in ("plain", *PERIOD[side])} for _ in range(rounds)]
    every = loop.marker.every
    means = [sum(often * r[kind] for kind, often in PERIOD[side].items()) / BALANCE for r in rows]
    more = [(mean - r["plain"]) / r["plain"] for mean, r in zip(means, rows, strict=True)]
    ratios = [1 + m / every for m in more]
    return {
        "carriers": loop.marker.carriers,
        "every": every,
        "ratio": statistics.median(ratios),
        "ratio_every_16": 1 + statistics.median(more) / 16,
        "ratios": [round(r, 4) for r in ratios],
        **{kind: statistics.median(r[kind] for r in rows) for kind in rows[0]},
        **first,
    }


def resident(field: str) -> int:
    """Bytes of this process: VmHWM, the peak, or VmRSS, what is there now."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise RuntimeError(field)


def memory(name: str, side: str) -> dict[str, int]:
    """Peak bytes of training steps of one side, over what was there before."""
    before = resident("VmRSS")
    loop = Loop(CASES[name], None if side == "plain" else side.removesuffix(" with preflight"))
    if side != "plain" and not side.endswith("preflight"):
        loop.skip_preflight()
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")
    kinds = ["plain", "plain"] if side == "plain" else ["plain", "penalty", "balance"]
    if side.endswith("preflight"):
        assert loop.marker is not None
        loop.marker.penalty(loop.net, (loop.x, loop.y))
    else:
        for kind in kinds:
            loop.step(kind)
            gc.collect()
    return {"peak": resident("VmHWM") - before}


def apart(name: str, side: str) -> int:
    """``memory`` in a process of its own, where freed blocks go back at once."""
    env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    command = [sys.executable, __file__, "--memory", name, side]
    found = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    return int(json.loads(found.stdout)["peak"])


def one(name: str, rounds: int) -> dict[str, Any]:
    case = CASES[name]
    row: dict[str, Any] = {"network": name, "batch": case.batch, "rounds": rounds, "gradmark": __version__}
    row["weights"] = sum(p.numel() for p in case.network().parameters())
    row["torch"] = str(torch.__version__)
    plain = apart(name, "plain")
    row["memory"] = {"plain": plain} | {
        side: {"bytes": (peak := apart(name, side)), "ratio": peak / plain}
        for side in ("default", "lean", *(("lean with preflight",) if name == "resnet20" else ()))
    }
    row["time"] = {side: seconds(case, side, rounds) for side in case.sides}
    return row


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", default=list(CASES))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--memory", nargs=2)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.memory:
        print(json.dumps(memory(*args.memory)))
        return
    RESULTS.mkdir(parents=True, exist_ok=True)
    for name in args.names:
        path = RESULTS / f"{name}.json"
        if not path.exists():
            path.write_text(json.dumps(one(name, args.rounds), indent=1) + "\n")
        print(path.read_text())


if __name__ == "__main__":
    main()
