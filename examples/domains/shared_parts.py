"""What the examples have in common: training with and without a mark, a table of verdicts, a picture."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from gradmark import Marker, MarkFile, ModuleSuspect, OwnerKey, Verdict, verify
from gradmark.embed import Recipe, train
from gradmark.protocols import Batch, Task
from gradmark.views import View, suspected

KEY = OwnerKey.from_seed(2026, "Acme Ltd")  # in earnest: OwnerKey.generate("Acme Ltd"), kept safe
STRANGER = OwnerKey.from_seed(2027, "A stranger")
Draw = Callable[[Any, Tensor, Tensor], None]


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


def table(title: str, verdicts: Mapping[str, Verdict]) -> None:
    """The verdicts, a row each, in the terminal."""
    rows = Table("suspect", "outcome", "log10 p", "bits right", "queries", title=title)
    for name, v in verdicts.items():
        rows.add_row(
            name, v.outcome, f"{v.log10_p:.1f}", f"{v.n_match} of {v.n_bits}", str(v.queries or "none")
        )
    Console(width=100).print(rows)


def show(title: str, verdicts: Mapping[str, Verdict], path: Path) -> None:
    """The verdicts as a table in the terminal, and as a picture in ``path``."""
    table(title, verdicts)
    picture(title, verdicts, path)
    print(f"Picture: {path}")


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
    right.set_xlabel("readings of bits; right of the line they agree")
    figure.suptitle(title)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def proved(
    task: Task, scheme: Any, recipe: Recipe, out: Path, draw: Draw, apis: dict[str, Any], **marking: Any
) -> dict[str, Verdict]:
    """Verdicts by name. ``apis``: from a name to (task, module around the network): what is served.

    ``draw`` gets matplotlib axes, a carrier and the same one nudged. The picture is ``out``.
    """
    torch.set_num_threads(1)
    data, nets = task.data(), {}
    pool = task.carriers(data.test.all())
    for kind in ("control", "marked"):
        torch.manual_seed(0)
        nets[kind], marker = task.network(), None
        if kind == "marked":
            control = suspected(task, ModuleSuspect(nets["control"]))
            scheme = scheme.calibrated(KEY, data.spec, control, pool)
            marker = Marker(scheme, KEY, data.spec, **marking)
        train(nets[kind], data.to_train(), recipe, marker=marker, task=task)
    found: dict[str, Verdict] = {}
    for who, key, kind in (
        ("owner", KEY, "marked"),
        ("wrong key", STRANGER, "marked"),
        ("owner", KEY, "control"),
    ):
        mark = MarkFile.create(key, scheme.name, _plain(scheme, key), data.spec, "signed-rank", 200)
        white = suspected(task, ModuleSuspect(nets[kind]))
        found[f"{who}, {kind}, weights"] = verify(mark, key, white, pool)
        for name, (served, around) in apis.items():
            api = suspected(served, ModuleSuspect(around(nets[kind])))
            found[f"{who}, {kind}, {name}"] = verify(mark, key, api, pool, access="black")
    table("A mark, its owner and others", found)
    for kind, net in nets.items():
        worth = task.utility(net)
        details = ", ".join(f"{n} {v:.3f}" for n, v in worth.details.items())
        print(f"{kind}: {worth.percent:.2f} % {details}")
    _picture(scheme, data.spec, pool, found, out, draw)
    return found


def _plain(scheme: Any, key: OwnerKey) -> dict[str, Any]:
    """The scheme's parameters; a stranger can't open the owner's reference and has none."""
    return {n: v for n, v in scheme.parameters().items() if key is KEY or n != "reference"}


def _picture(scheme: Any, spec: Any, pool: Any, found: dict[str, Verdict], out: Path, draw: Draw) -> None:
    from matplotlib.figure import Figure

    mark = scheme.mark(KEY, spec)
    x, labels = pool[0][:1], pool[1][:1]
    nudge = mark.directions.one(x, mark.group(labels), torch.zeros(1, dtype=torch.int64))
    figure = Figure((10, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.4))
    draw(left, x[0], spec.snap(x + nudge)[0])
    for kind, colour in (("control", "0.6"), ("marked", "C0")):
        verdict = found[f"owner, {kind}, weights"]
        if verdict.reading is not None:
            signed = (verdict.reading.values * verdict.reading.bits).sort().values
            right.plot(signed, ".", color=colour, label=f"{kind}: log10 p {verdict.log10_p:.1f}")
    right.axhline(0, color="0.3", linewidth=0.8)
    right.set(xlabel="bits, sorted", ylabel="reading times bit, logits", title="Above zero: the bit is right")
    right.legend(frameon=False)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=110)
    print(f"Picture: {out}")
