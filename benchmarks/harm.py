"""What strength buys and what it harms: digits, one development key, the knobs of the ensemble turned one by one.

    python benchmarks/harm.py            writes results/harm.json and prints the table

Seed and key are used nowhere else. Harm is measured by the audit's side effects against the control.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gradmark import Ensemble, FilterGradient, Marker, MarkFile, ModuleSuspect, OwnerKey, catalog, verify
from gradmark.audit.effects import side_effects
from gradmark.bench.networks import DigitsNet
from gradmark.data import load_data
from gradmark.demo.run import RECIPE
from gradmark.embed import train
from gradmark.protocols import Thief
from gradmark.schemes.class_contrast import ClassContrast
from gradmark.schemes.trigger import Trigger

RESULTS = Path(__file__).parent / "results" / "harm.json"
SEED = 77_000
FILTER = FilterGradient(bits=128, kernel_size=5, step=0.1)
ALL = (FILTER, ClassContrast(), Trigger())
ATTACKS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("output-round", {"decimals": 1}), ("output-top1", {}), ("distill", {"temperature": 1.0}), ("distill", {}), ("finetune", {}),
)  # fmt: skip
VARIANTS: dict[str, tuple[tuple[Any, ...], float, float]] = {  # parts, margin, smoothing
    "no mark, no smoothing": ((), 0.0, 0.0),
    "no mark, smoothing .1": ((), 0.0, 0.1),
    "class-contrast, margin 1": ((ClassContrast(),), 1.0, 0.1),
    "filter-gradient, margin 1": ((FILTER,), 1.0, 0.1),
    "trigger, margin 1": ((Trigger(),), 1.0, 0.1),
    "all three, margin 1": (ALL, 1.0, 0.1),
    "all three, margin 2": (ALL, 2.0, 0.1),
    "all three, margin 0.5": (ALL, 0.5, 0.1),
    "all three, margin 1, smoothing .03": (ALL, 1.0, 0.03),
    "all three, margin 1, no smoothing": (ALL, 1.0, 0.0),
}
SHOWN = (
    "accuracy",
    "calibration error (ECE)",
    "PGD, radius 0.03",
    "noise 2",
    "blur 2",
    "contrast 2",
    "brightness 2",
)


def row(name: str, data: Any, control: nn.Module, thief: Thief) -> dict[str, Any]:
    parts, margin, smoothing = VARIANTS[name]
    key, pool = OwnerKey.from_seed(SEED), data.test.all()
    torch.manual_seed(SEED)
    net, marker, found = DigitsNet(), None, {}
    if parts:
        scheme = Ensemble(parts).calibrated(key, data.spec, ModuleSuspect(control), pool)
        marker = Marker(scheme, key, data.spec, margin=margin, carriers=64, every=1, seed=SEED)
    train(net, data.to_train(), replace(RECIPE, seed=SEED, smoothing=smoothing), marker=marker)
    if parts:
        mark = MarkFile.create(key, scheme.name, scheme.parameters(), data.spec, "signed-rank", 200)
        for attack, settings in (("none", {}), *ATTACKS):
            stolen = net
            if attack != "none":
                stolen = catalog.attack(attack, settings).run(net, thief, torch.Generator().manual_seed(1))
            label = " ".join([attack, *(f"{k}={v}" for k, v in settings.items())])
            found[label] = round(verify(mark, key, ModuleSuspect(stolen), pool, access="black").log10_p, 1)
    effects, _ = side_effects(
        ModuleSuspect(net), ModuleSuspect(control), pool, data.spec, torch.Generator().manual_seed(0)
    )
    return {"variant": name, "log10_p": found, "effects": {e.name: round(e.model, 4) for e in effects}}


def main() -> None:
    torch.set_num_threads(1)
    data = load_data("digits")
    torch.manual_seed(SEED)
    control = DigitsNet()
    train(control, data.to_train(), replace(RECIPE, seed=SEED))
    x, labels = data.to_train().all()
    third = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))[: len(x) // 3]
    thief = Thief(data.spec, x[third], labels[third], fresh=DigitsNet, lr=0.01)
    rows = []
    for name in VARIANTS:
        rows.append(row(name, data, control, thief))
        shown = {k: v for k, v in rows[-1]["effects"].items() if k in SHOWN}
        print(name, rows[-1]["log10_p"], shown, flush=True)
    RESULTS.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
