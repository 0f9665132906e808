"""What the preflight finds in and around a model, what it says, and what the command line makes of it."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import nn

import strange
from commandline import gradmark, refused
from conformance import KEY, SPECS, network, same_world, scheme_for, world
from gradmark.embed import Preflight, surroundings, survey
from gradmark.embed.modes import penalty_mode
from gradmark.suspects import ModuleSuspect


def look(model: nn.Module, domain: str = "vector", wanted: str = "auto") -> Preflight:
    scheme = scheme_for("filter-gradient", domain)
    batch = strange.STEREO if domain == "stereo" else strange.VECTOR
    return survey(scheme, scheme.mark(KEY, SPECS[domain]), model, batch, wanted)


def found(told: Preflight) -> str:
    return "; ".join(f.what for f in told.findings)


def attention() -> nn.Module:
    return strange.seeded(lambda: strange.Frames(strange.Attention(), 32))


def lstm() -> nn.Module:
    return strange.seeded(lambda: strange.Frames(nn.LSTM(32, 24, batch_first=True), 24))


def custom(function: Any) -> nn.Module:
    return strange.seeded(lambda: strange.Custom(function.apply))


def normed() -> nn.Module:
    body = network("vector")
    return nn.Sequential(*body[:-1], nn.BatchNorm1d(64), body[-1]).train()


def compiled() -> nn.Module:
    return torch.compile(network("vector"), backend="aot_eager")  # type: ignore[return-value]


CASES: dict[str, tuple[Any, str, str, list[bool]]] = {
    "plain": (lambda: network("vector"), "vector", "", [True, True]),
    "fused attention": (attention, "stereo", "fused attention", [True, True]),
    "LSTM": (lstm, "stereo", "a fused RNN", [True, True]),
    "batch norm": (normed, "vector", "batch norm in training", [True, True]),
    "torch.compile": (compiled, "vector", "torch.compile", [True, True]),
    "checkpointing": (lambda: strange.Remembering(True), "vector", "checkpointing", [True, True]),
    "reentrant checkpointing": (
        lambda: strange.Checkpointed(True), "vector", "reentrant checkpointing", [True, False],
    ),
    "custom Function, first derivative only": (
        lambda: custom(strange.WrongSquare), "vector", "custom Function WrongSquare", [True, False],
    ),
    "custom Function, wrong": (
        lambda: custom(strange.WrongFirst), "vector", "custom Function WrongFirst", [False, False],
    ),
    "dropout in eval mode": (strange.Stochastic, "vector", "", [False, False]),
    "DeepSpeed": (strange.DeepSpeedEngine, "vector", "DeepSpeed", []),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore::UserWarning")  # dynamo's own
@pytest.mark.parametrize("name", CASES)
def test_what_is_there_is_told_and_judged(name: str, record_property: Any) -> None:
    make, domain, what, right = CASES[name]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        told = look(make(), domain)
    assert what in found(told)
    assert bool(found(told)) == bool(what)
    assert [c.ok for c in told.checks] == right
    assert told.method == ("central-difference" if right and right[0] else None)
    assert bool(told.reason) == (told.method is None)
    record_property("report", json.dumps(told.to_json(), allow_nan=False))


def test_a_wish_is_respected() -> None:
    assert [c.method for c in look(network("vector"), wanted="exact").checks] == ["exact"]


def test_looking_changes_nothing() -> None:
    model = normed()
    before = world(model)
    look(model)
    assert same_world(before, world(model))


def test_the_command_prints_a_table() -> None:
    result = gradmark("preflight", "--model", "tiny:net", "--data", "digits", "--set", "step=0.1")
    assert result.code == 0, result.err
    assert "RIGHT: the penalty will be computed by central-difference." in result.out
    assert "batch norm in training" in result.out


def test_the_command_speaks_json() -> None:
    told = gradmark(
        *("preflight", "--model", "tiny:net", "--data", "digits", "--set", "step=0.1"),
        *("--precision", "bfloat16", "--method", "exact", "--json"),
    ).json()
    assert told["ok"] is True
    assert told["method"] == "exact"
    assert told["checks"][0]["own"] > 1e-4


def test_the_command_refuses_with_exit_code_2() -> None:
    result = gradmark("preflight", "--model", "tiny:noisy", "--data", "digits", "--json")
    assert result.code == 2
    assert result.json()["ok"] is False
    assert "finite difference" in result.json()["reason"]


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (("--precision", "int8"), ("No such precision", "bfloat16")),
        (("--method", "guess"), ("No such method", "exact")),
        (("--device", "cuda:7"), ("device", "cuda:7")),
    ],
)
def test_settings_without_sense_are_refused(more: tuple[str, str], words: tuple[str, ...]) -> None:
    if torch.cuda.is_available() and "cuda:7" in more:
        pytest.skip("there is an accelerator")
    refused(gradmark("preflight", "--model", "tiny:net", "--data", "digits", *more), *words)


@pytest.mark.parametrize(("device", "told"), [("cuda", True), ("cpu", False)])
def test_an_rnn_on_an_accelerator_is_told(monkeypatch: pytest.MonkeyPatch, device: str, told: bool) -> None:
    """By what it is: the penalty's graph holds no kernel of cuDNN."""
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: True)
    rnn, other = nn.Sequential(nn.LSTM(4, 4)), nn.Linear(4, 4)
    assert surroundings._cudnn_rnn(rnn, torch.device(device)) is told
    assert not surroundings._cudnn_rnn(other, torch.device(device))


def test_rnns_are_differentiated_without_cudnn() -> None:
    """Which has no backward pass in evaluation mode, where penalties and readings look."""
    seen: list[bool] = []

    class Recording(nn.LSTM):
        def forward(self, *given: Any) -> Any:
            seen.append(torch.backends.cudnn.enabled)
            return super().forward(*given)

    before = torch.backends.cudnn.enabled
    model = strange.seeded(lambda: strange.Frames(Recording(32, 24, batch_first=True), 24)).train()
    for method in ("central-difference", "exact"):
        with penalty_mode(model, method):
            model(strange.STEREO[0])
    suspect = ModuleSuspect(model)
    suspect.vjp(strange.STEREO[0][:2], torch.ones_like(suspect.query(strange.STEREO[0][:2])))
    assert len(seen) >= 4
    assert not any(seen)
    assert torch.backends.cudnn.enabled == before
