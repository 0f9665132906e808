"""What strength buys and what it harms: digits, one development key, the knobs of the ensemble turned one by one.

    python benchmarks/harm.py [VARIANT ...]      writes results/harm.json and prints the table; of the variants named
                                                 alone, where the others' rows are kept

Seed and key are used nowhere else. Harm is measured by the audit's side effects against the control.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean
from typing import Any, ClassVar

import torch
from torch import nn

from gradmark import Ensemble, FilterGradient, Marker, MarkFile, ModuleSuspect, OwnerKey, catalog, verify
from gradmark.audit.effects import side_effects
from gradmark.bench.networks import DigitsNet
from gradmark.data import load_data
from gradmark.demo.run import RECIPE
from gradmark.embed import train
from gradmark.embed.temper import confidence_of, temper
from gradmark.protocols import Thief
from gradmark.schemes.class_contrast import ClassContrast
from gradmark.schemes.trigger import Trigger

RESULTS = Path(__file__).parent / "results" / "harm.json"
SEED = 77_000
FILTER = FilterGradient(bits=128, kernel_size=5, step=0.1)
ALL = (FILTER, ClassContrast(), Trigger())
MORE = (FILTER, ClassContrast(), Trigger(bits=128))
TONES = (FILTER, ClassContrast(), Trigger(pattern="two-tone"))
MORE_TONES = (FILTER, ClassContrast(), Trigger(bits=128, pattern="two-tone"))
ATTACKS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("output-round", {"decimals": 1}), ("output-top1", {}), ("distill", {"temperature": 1.0}), ("distill", {}), ("finetune", {}),
    ("rtll", {}), ("rtal", {}),
)  # fmt: skip


@dataclass(frozen=True)
class Variant:
    """``parts`` of the ensemble, their ``margin`` in shares or, ``even``, alike; and what training adds."""

    parts: tuple[Any, ...] = ALL
    margin: float = 1.0
    smoothing: float = 0.1
    calibrate: bool = False
    even: bool = False
    new_heads: bool = True
    rehearse: float | None = None


class Even(Ensemble):
    """Every part up to its own whole margin."""

    shares: ClassVar[dict[str, float]] = {}


VARIANTS = {
    "no mark, no smoothing": Variant((), smoothing=0.0),
    "no mark, smoothing .1": Variant(()),
    "class-contrast alone": Variant((ClassContrast(),)),
    "filter-gradient alone": Variant((FILTER,)),
    "trigger alone": Variant((Trigger(),)),
    "trigger alone, two-tone": Variant((Trigger(pattern="two-tone"),)),
    "all three (default)": Variant(),
    "all three, no new heads": Variant(new_heads=False),
    "all three, equal shares": Variant(even=True),
    "all three, margin 2": Variant(margin=2.0),
    "all three, margin .5": Variant(margin=0.5),
    "all three, calibrated": Variant(calibrate=True),
    "all three, smoothing .03": Variant(smoothing=0.03),
    "all three, no smoothing": Variant(smoothing=0.0),
    "all three, 128 triggers": Variant(MORE),
    "all three, rehearsed": Variant(rehearse=RECIPE.lr),
    "all three, 128 triggers, rehearsed": Variant(MORE, rehearse=RECIPE.lr),
    "all three, two-tone triggers": Variant(TONES),
    "all three, 128 two-tone triggers": Variant(MORE_TONES),
    "all three, 128 two-tone triggers, rehearsed": Variant(MORE_TONES, rehearse=RECIPE.lr),
}
SHOWN = (
    "accuracy",
    "calibration error (ECE)",
    "PGD, radius 0.03",
    "noise 2",
    "blur 2",
    "contrast 2",
    "brightness 2",
    "corruptions, mean",
)


def row(name: str, data: Any, control: nn.Module, thief: Thief) -> dict[str, Any]:
    v = VARIANTS[name]
    key, pool = OwnerKey.from_seed(SEED), data.test.all()
    torch.manual_seed(SEED)
    net, marker, found = DigitsNet(), None, {}
    if v.parts:
        kind = Even if v.even else Ensemble
        scheme = kind(v.parts).calibrated(key, data.spec, ModuleSuspect(control), pool)
        marker = Marker(scheme, key, data.spec, margin=v.margin, carriers=64, every=1, seed=SEED,
                        new_heads=v.new_heads, rehearse=v.rehearse)  # fmt: skip
    train(net, data.to_train(), replace(RECIPE, seed=SEED, smoothing=v.smoothing), marker=marker)
    if v.calibrate:
        temper(net, data.to_train(), confidence_of(control, data.to_train()))
    if v.parts:
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
    measured = {e.name: round(e.model, 4) for e in effects}
    measured["corruptions, mean"] = round(mean(e.model for e in effects if e.kind == "corruption"), 4)
    return {"variant": name, "log10_p": found, "effects": measured}


def table(rows: list[dict[str, Any]]) -> list[str]:
    """The rows of docs/science.md."""
    attacks = list(rows[-1]["log10_p"])
    lines = [
        "| variant | " + " | ".join([*attacks, *SHOWN]) + " |",
        "|" + "---|" * (1 + len(attacks) + len(SHOWN)),
    ]
    for r in rows:
        p = [str(r["log10_p"].get(a, "")) for a in attacks]
        lines.append(
            "| " + " | ".join([r["variant"], *p, *(f"{100 * r['effects'][e]:.1f}" for e in SHOWN)]) + " |"
        )
    return lines


def main() -> None:
    torch.set_num_threads(1)
    data = load_data("digits")
    torch.manual_seed(SEED)
    control = DigitsNet()
    train(control, data.to_train(), replace(RECIPE, seed=SEED))
    x, labels = data.to_train().all()
    third = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))[: len(x) // 3]
    thief = Thief(data.spec, x[third], labels[third], fresh=DigitsNet, lr=0.01)
    kept = {r["variant"]: r for r in json.loads(RESULTS.read_text())} if sys.argv[1:] else {}
    for name in sys.argv[1:] or VARIANTS:
        kept[name] = row(name, data, control, thief)
        print(name, kept[name], flush=True)
    rows = [kept[name] for name in VARIANTS if name in kept]
    print("\n".join(table(rows)))
    RESULTS.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
