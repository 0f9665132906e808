"""The commands that attack and measure: ``bench`` and ``attack``."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from gradmark.errors import UsageError
from gradmark.terminal import Device, Json, Seed, SomeData, command, err, show


@command("gradmark bench digits-quick --out bench-out --jobs 2")
def bench(
    suite: Annotated[
        str, typer.Argument(help="digits, digits-quick, speech, cifar10, or a .json or .toml file.")
    ],
    out: Annotated[
        Path, typer.Option(help="Folder for networks, cells, table and pictures; what is there is used.")
    ] = Path("bench-out"),
    resume: Annotated[
        bool, typer.Option("--resume/--fresh", help="Skip finished cells, or do them again.")
    ] = True,
    ray: Annotated[
        str | None, typer.Option(help="Address of a Ray cluster that sees OUT; local: one started here.")
    ] = None,
    jobs: Annotated[int, typer.Option(help="Processes, with one thread each.", min=1)] = 1,
    only: Annotated[
        str | None, typer.Option(help="Pattern of attack labels, or of task/scheme/label-seed.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Added to each of the suite's seeds.", min=0)] = 0,
    device: Device = "cpu",
    as_json: Json = False,
) -> int:
    """Measure schemes against attacks: networks, cells, a table and pictures; goes on where it stopped."""
    from gradmark.commands.bench import BenchJob, run_bench

    done = run_bench(BenchJob(suite, out, not resume, ray, jobs, only, seed, device), err())
    return show(0, as_json, done.to_json(), *done.shown())


@command(
    "gradmark attack signed/model.safetensors --attack finetune,prune --model nets:net --data d.npz --out a"
)
def attack(
    suspect: Annotated[Path | None, typer.Argument(help="The weights to attack, .safetensors.")] = None,
    attack_: Annotated[
        str | None, typer.Option("--attack", help="NAME[,NAME]; a+b runs b on what a made.")
    ] = None,
    data: SomeData = None,
    model: Annotated[str | None, typer.Option(help="MODULE:FACTORY of the network.")] = None,
    out: Annotated[
        Path | None, typer.Option(help="New folder for the attacked weights and attack.json.")
    ] = None,
    parameters: Annotated[
        str, typer.Option(help='JSON, as {"epochs": 2}; with several attacks, one object for each name.')
    ] = "{}",
    lr: Annotated[float, typer.Option(help="The thief's learning rate.")] = 0.01,
    optimizer: Annotated[str, typer.Option(help="sgd or adamw.")] = "sgd",
    batch_size: Annotated[int, typer.Option(min=2)] = 64,
    mark: Annotated[
        Path | None, typer.Option(help="The public mark.json: a thief who read it knows the nudges' size.")
    ] = None,
    seed: Seed = 0,
    list_: Annotated[bool, typer.Option("--list", help="Show all attacks and their parameters.")] = False,
    as_json: Json = False,
) -> int:
    """Attack a model of your own as a thief would who has its training data."""
    from gradmark.commands.attack import AttackJob, known_attacks, parse_parameters, run_attack, shown

    if list_:
        known = known_attacks()
        return show(0, as_json, {"attacks": [asdict(one) for one in known]}, shown(known))
    if suspect is None or attack_ is None or data is None or model is None or out is None:
        raise UsageError(
            "Too little is said of what to attack, and how",
            expected="SUSPECT, --attack, --data, --model and --out, or --list alone",
            fix="gradmark attack --help has an example",
        )
    names = tuple(dict.fromkeys(name.strip() for name in attack_.split(",") if name.strip()))
    job = AttackJob(
        suspect, names, parse_parameters(parameters), data, model, out, lr, optimizer, batch_size, seed, mark
    )
    done = run_attack(job, err())
    lines = [f"Accuracy before: {100 * done['accuracy']:.2f}%"]
    lines += [
        f"{a['attack']}: {100 * a['accuracy']:.2f}%, {a['seconds']} s, {a['model']}" for a in done["attacks"]
    ]
    return show(0, as_json, done, *lines)
