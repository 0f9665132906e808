"""What the examples have in common: a plain training loop, a table of verdicts and a picture."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gradmark import Marker, Verdict
from gradmark.protocols import Batch, Task
from gradmark.views import View


def fit(
    model: nn.Module,
    task: Task,
    batch: Callable[[torch.Generator], Batch],
    steps: int,
    lr: float,
    markers: tuple[tuple[Marker, Task], ...] = (),
) -> nn.Module:
    """AdamW with a cosine. A mark is one more line: ``loss + marker.penalty(View(task, model), batch)``."""
    optimizer = torch.optim.AdamW(model.parameters(), lr)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda t: min(1.0, (t + 1) / 20) * 0.5 * (1 + math.cos(math.pi * t / steps))
    )
    generator = torch.Generator().manual_seed(1)
    model.train()
    for _ in range(steps):
        given = batch(generator)
        loss = task.loss(model, given)
        for marker, view in markers:
            loss = loss + marker.penalty(View(view, model), given)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()
        schedule.step()
    return model.eval()


def show(title: str, verdicts: Mapping[str, Verdict], path: Path) -> None:
    """The verdicts as a table in the terminal, and as a picture in ``path``."""
    from rich.console import Console
    from rich.table import Table

    table = Table("suspect", "outcome", "log10 p", "bits right", "queries", title=title)
    for name, v in verdicts.items():
        table.add_row(
            name, v.outcome, f"{v.log10_p:.1f}", f"{v.n_match} of {v.n_bits}", str(v.queries or "none")
        )
    console = Console()
    console.print(table)
    picture(title, verdicts, path)
    console.print(f"Picture: {path}")


def picture(title: str, verdicts: Mapping[str, Verdict], path: Path) -> None:
    """How sure each reading is, and what was read, bit by bit."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    names = list(verdicts)
    left.barh(names[::-1], [-verdicts[n].log10_p for n in names[::-1]], color="#3a6ea5")
    left.axvline(6, color="#b03030", linewidth=1, label="the threshold, one in a million")
    left.set_xlabel("zeros before the first digit of p")
    left.legend(frameon=False, fontsize=8)
    for i, name in enumerate(names):
        reading: Any = verdicts[name].reading
        signed = (reading.values * reading.bits).tolist()
        right.scatter(
            signed, [len(names) - 1 - i] * len(signed), s=9, alpha=0.5, color="#3a6ea5", linewidths=0
        )
    right.axvline(0, color="#b03030", linewidth=1)
    right.set_yticks(range(len(names)), names[::-1])
    right.set_xlabel("each bit's reading: to the right, it agrees with the key")
    figure.suptitle(title)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)
