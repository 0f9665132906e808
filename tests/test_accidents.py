"""What goes wrong in somebody's training loop, and mustn't go on for ever."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from conformance import KEY, SPECS, inputs, network, scheme_for
from gradmark import catalog
from gradmark.embed import Marker
from gradmark.embed.heads import drawn
from gradmark.errors import ModelError, ResumeError, UsageError
from gradmark.integrations.state import load_marker, save_marker

X, Y = inputs("grey", 64, seed=0)


def images(norm: type[nn.Module] = nn.BatchNorm2d, first: nn.Module | None = None) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3), first or nn.Identity(), norm(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 10)
    )


def test_a_loss_that_overflows_once_leaves_the_weight_finite() -> None:
    """Loops in half precision skip such a step and go on."""
    broken = [False]

    def task_loss(scores: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(scores, labels) * (float("inf") if broken[0] else 1.0)

    model = network("grey")
    marker = Marker(scheme_for("ensemble", "grey"), KEY, SPECS["grey"], every=1, task_loss=task_loss)
    weights = []
    for step in range(36):  # the norms are looked at by every sixteenth penalty
        broken[0] = step == 16
        marker.penalty(model, (X, Y))
        weights.append(marker.status().weight)
    assert all(0 < w < 1e3 for w in weights)
    assert weights[16] == weights[15]
    assert weights[33] != weights[16], "the balance goes on"


class Overflowing(nn.Module):
    on = False

    def forward(self, x: Tensor) -> Tensor:
        return x * float("inf") if self.on and len(x) != len(X) else x


def test_probes_that_overflow_spoil_no_statistics() -> None:
    overflowing = Overflowing()
    model = images(first=overflowing)
    marker = Marker(scheme_for("ensemble", "grey"), KEY, SPECS["grey"], every=1)
    marker.penalty(model, (X, Y))
    before, buffers = copy.deepcopy(model.state_dict()), [id(b) for b in model.buffers()]
    overflowing.on = True
    with pytest.raises(ModelError, match="not finite"):
        marker.penalty(model, (X, Y))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert [id(b) for b in model.buffers()] == buffers
    assert all(part.training for part in model.modules())


def test_synchronised_batch_norms_carry_the_mark_as_plain_ones_do() -> None:
    penalties = []
    for norm in (nn.BatchNorm2d, nn.SyncBatchNorm):
        marker = Marker(scheme_for("ensemble", "grey"), KEY, SPECS["grey"], every=1)
        penalties.append(float(marker.penalty(images(norm), (X, Y)).detach()))
    assert penalties[0] == penalties[1] > 0


def test_no_global_generator_is_seeded(monkeypatch: pytest.MonkeyPatch) -> None:
    """``torch.manual_seed`` reaches every accelerator, and no block around it undoes that."""

    def refuse(seed: int) -> None:
        raise AssertionError(f"seeded with {seed}")

    monkeypatch.setattr(torch, "manual_seed", refuse)
    monkeypatch.setattr(torch.cuda, "manual_seed_all", refuse)
    model: Any = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    scheme = catalog.scheme("class-contrast")
    settings: dict[str, Any] = {"every": 1, "carriers": 64, "strength": 3.0, "margin": 0.05}
    marker = Marker(scheme, KEY, SPECS["grey"], new_heads=True, rehearse=1e-3, **settings)
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    for _ in range(60):
        loss = F.cross_entropy(model(X), Y) + marker.penalty(model, (X, Y))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert marker.head is not None
    assert marker.head.age > 0, "a new layer was drawn"
    assert marker.rehearsal is not None
    assert marker.rehearsal.age > 0, "and a thief rehearsed"


@pytest.mark.parametrize("bias", [True, False])
def test_a_drawn_layer_is_the_one_that_the_global_generator_gives(bias: bool) -> None:
    torch.manual_seed(7)
    layer = nn.Linear(9, 4, bias=bias)
    state = torch.get_rng_state()
    mine = drawn(9, 4, bias, 7)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(mine.parameters(), layer.parameters(), strict=True))


@pytest.mark.parametrize("name", ["strength", "weight", "budget", "margin"])
@pytest.mark.parametrize("value", [-1.0, 0.0, float("nan"), float("inf")])
def test_a_push_the_wrong_way_is_refused(name: str, value: float) -> None:
    if (name, value) == ("weight", 0.0):  # no push at all
        return
    with pytest.raises(UsageError, match="strength of a mark"):
        Marker(scheme_for("ensemble", "grey"), KEY, SPECS["grey"], **{name: value})


def test_the_state_of_a_marker_with_other_settings_is_refused(tmp_path: Any) -> None:
    scheme = scheme_for("ensemble", "grey")
    save_marker(Marker(scheme, KEY, SPECS["grey"], new_heads=False), tmp_path)
    with pytest.raises(ResumeError, match="other settings"):
        load_marker(Marker(scheme, KEY, SPECS["grey"], new_heads=True), tmp_path)
    with pytest.raises(ResumeError, match="other settings"):
        load_marker(Marker(scheme, KEY, SPECS["grey"], new_heads=False, rehearse=0.01), tmp_path)
    load_marker(Marker(scheme, KEY, SPECS["grey"], new_heads=False), tmp_path)


def test_a_resumed_run_whose_bits_are_others_is_refused() -> None:
    """As where a scheme is made anew by another version, and not taken from the mark file."""
    whole: Any = scheme_for("ensemble", "grey")
    state = Marker(whole, KEY, SPECS["grey"]).state_dict()
    with pytest.raises(ResumeError, match="another mark"):
        Marker(replace(whole, joint=False), KEY, SPECS["grey"]).load_state_dict(state)
    Marker(whole, KEY, SPECS["grey"]).load_state_dict(state)
    del state["whose"]
    Marker(whole, KEY, SPECS["grey"]).load_state_dict(state)  # of a version that didn't say


class Checkpointed(nn.Module):
    """A convolution with its batch norm that runs again in the backward pass, or not."""

    def __init__(self, checkpointed: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten())
        self.head, self.checkpointed = nn.Linear(288, 10), checkpointed

    def forward(self, x: Tensor) -> Tensor:
        hidden: Any = checkpoint(self.body, x, use_reentrant=False) if self.checkpointed else self.body(x)
        scores: Tensor = self.head(hidden)
        return scores


@pytest.mark.parametrize("soften", [0.0, 0.3])
def test_checkpointed_batch_norms_carry_the_default_as_others_do(soften: float) -> None:
    """Triggers and softened carriers pass norms that look at natural inputs alone, in the second pass too."""
    found = []
    for checkpointed in (False, True):
        model = Checkpointed(checkpointed).train()
        marker = Marker(
            catalog.scheme("ensemble"),
            KEY,
            SPECS["grey"],
            every=1,
            soften=soften,
            method="central-difference",
        )
        (F.cross_entropy(model(X), Y) + marker.penalty(model, (X, Y))).backward()
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]
        found.append(torch.cat([g.flatten() for g in grads]))
        handles = [len(m._forward_hooks) for m in model.modules()]
        assert not any(handles), "nothing is left behind"
    torch.testing.assert_close(found[0], found[1], rtol=1e-3, atol=1e-5)
