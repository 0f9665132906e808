"""What the examples share: train with and without the mark, ask, tell, draw."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from gradmark import Marker, MarkFile, ModuleSuspect, OwnerKey, Verdict, verify
from gradmark.embed import Recipe, train
from gradmark.protocols import Task
from gradmark.views import suspected

KEY = OwnerKey.from_seed(2026, "Acme Ltd")  # in earnest: OwnerKey.generate("Acme Ltd"), kept safe
STRANGER = OwnerKey.from_seed(2027, "A stranger")
Draw = Callable[[Any, Tensor, Tensor], None]


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
    _tell(task, nets, found)
    _picture(scheme, data.spec, pool, found, out, draw)
    return found


def _plain(scheme: Any, key: OwnerKey) -> dict[str, Any]:
    """The scheme's parameters; a stranger can't open the owner's reference and has none."""
    return {n: v for n, v in scheme.parameters().items() if key is KEY or n != "reference"}


def _tell(task: Task, nets: dict[str, nn.Module], found: dict[str, Verdict]) -> None:
    console = Console(width=100)
    table = Table("who asks, of which network, how", "verdict", "log10 p", "queries")
    for name, v in found.items():
        table.add_row(name, v.outcome, f"{v.log10_p:.1f}", str(v.queries or ""))
    console.print(table)
    for kind, net in nets.items():
        worth = task.utility(net)
        details = ", ".join(f"{n} {v:.3f}" for n, v in worth.details.items())
        console.print(f"{kind}: {worth.percent:.2f} % {details}", highlight=False)


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
    figure.savefig(out, dpi=110)
    Console(width=100).print(f"The picture is in {out.name}")
