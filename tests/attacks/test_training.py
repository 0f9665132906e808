"""Attacks that train: each does to a tiny network what it says, in every domain and precision."""

from __future__ import annotations

import copy
import sys
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from conformance import SPECS, inputs, network, scheme_for
from gradmark import catalog
from gradmark.attacks import flatten
from gradmark.attacks.adversarial import Adversarial
from gradmark.attacks.launder import Launder
from gradmark.embed import Marker
from gradmark.errors import AttackError, ModelError
from gradmark.keys import OwnerKey
from gradmark.neurons import observe
from gradmark.protocols import Batch, Thief
from gradmark.suspects import ModuleSuspect
from gradmark.thief import fit, label_loss, logits
from gradmark.views import Classification, View

NAMES = [
    "ftll", "rtll", "rtal", "fine-prune", "smooth", "regularize", "adversarial", "lora", "overwrite",
    "launder", "flatten", "subtract-mean", "self-distill", "dark-noise", "gradient-masking",
]  # fmt: skip


class Towards:
    """A stand-in for a thief's marker: pulls the scores of class 0 to a number."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def penalty(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return (model(batch[0])[:, 0] - 20).square().mean()


def thief(domain: str = "grey", n: int = 200, **more: Any) -> Thief:
    return Thief(SPECS[domain], *inputs(domain, n, seed=0), batch_size=50, marker=Towards, **more)


@cache
def victim(domain: str = "grey") -> nn.Sequential:
    """A trained network with batch norm and dropout. Don't change it."""
    body = network(domain)
    first = [nn.BatchNorm2d(16)] if domain == "grey" else []
    model = nn.Sequential(body[0], *first, *body[1:-1], nn.Dropout(0.1), body[-1])
    fit(model, thief(domain, lr=0.05), rng(), epochs=8)
    return model


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def attack(name: str, model: nn.Module | None = None, of: Thief | None = None, **more: Any) -> nn.Module:
    if name == "lora":
        pytest.importorskip("peft")
    return catalog.attack(name, more).run(victim() if model is None else model, of or thief(), rng())


def changed(attacked: nn.Module, model: nn.Module) -> set[str]:
    """Names of the entries of the state that differ."""
    old = model.state_dict()
    return {name for name, value in attacked.state_dict().items() if not torch.equal(value, old[name])}


# --- all of them ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_names(name: str) -> None:
    made = catalog.attack(name)
    assert made.name == name
    assert made == catalog.attack(name)
    assert "epochs=5" in repr(made)


class Pooled(nn.Module):
    """Ends in a 1x1 convolution, the mean over positions and probabilities."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(1, 12, 3, groups=1), nn.ReLU(), nn.Conv2d(12, 12, 3, groups=12))
        self.head = nn.Conv2d(12, 10, 1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        scores = self.head(self.body(x).relu()).mean((2, 3))
        return {"logits": scores.softmax(1)}


@pytest.mark.parametrize("kind", ["vector", "mono", "stereo", "bfloat16", "pooled"])
@pytest.mark.parametrize("name", NAMES)
def test_any_input_any_model_any_precision(name: str, kind: str) -> None:
    domain = kind if kind in SPECS else "grey"
    model = Pooled() if kind == "pooled" else network(domain)
    of = thief(domain, 100, autocast=torch.bfloat16 if kind == "bfloat16" else None)
    if name == "overwrite" and kind == "pooled":
        of = replace(of, marker=Mark)
    attacked = attack(name, model, of, epochs=1)
    assert changed(attacked, model)
    assert list(attacked.state_dict()) == list(model.state_dict())
    assert [p.requires_grad for p in attacked.parameters()] == [p.requires_grad for p in model.parameters()]
    assert bool(torch.isfinite(logits(attacked, of.x)).all())


class Mark(Towards):
    def penalty(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return logits(model, batch[0]).square().mean()


# --- the thief's loop -------------------------------------------------------------------------------------


def test_weights_left_out_take_no_gradient() -> None:
    model = copy.deepcopy(victim())
    model[0].bias.requires_grad_(False)
    seen = []

    def loss(model: nn.Module, x: Tensor, labels: Tensor) -> Tensor:
        seen.append([p.requires_grad for p in model.parameters()])
        return label_loss(model, x, labels)

    before, calls = [p.requires_grad for p in model.parameters()], []
    fit(model, thief(), rng(), epochs=2, loss=loss, weights=[model[-1].weight], after=lambda: calls.append(1))
    assert sum(seen[0]) == 1
    assert [p.requires_grad for p in model.parameters()] == before
    assert len(calls) == 8


def test_probabilities_become_logarithms() -> None:
    scores = torch.randn(5, 10)
    torch.testing.assert_close(logits(nn.Softmax(1), scores), scores.log_softmax(1))
    assert torch.equal(logits(nn.Identity(), scores), scores)
    assert torch.equal(logits(nn.Identity(), torch.zeros(4, 30)), torch.zeros(4, 30))


def test_neurons_are_found_with_their_norms() -> None:
    x = thief().x
    found = observe(victim(), x, batch_size=64)
    assert [type(n.layer) for n in found] == [nn.Conv2d, nn.Linear, nn.Linear]
    assert found[0].norm is victim()[1]
    assert found[1].norm is None
    active = victim()[:2](x).relu().mean((2, 3)).detach()
    torch.testing.assert_close(found[0].mean, active.mean(0))
    torch.testing.assert_close(found[0].deviation, active.std(0, correction=0))
    assert not victim()[0]._forward_hooks


# --- retraining, pruning, shrinking -----------------------------------------------------------------------


def test_the_last_layer_alone() -> None:
    head = {f"{len(victim()) - 1}.{p}" for p in ("weight", "bias")}
    for name in ("ftll", "rtll"):
        assert changed(attack(name, epochs=1), victim()) == head
    assert changed(attack("ftll", epochs=0), victim()) == set()
    for name in ("rtll", "rtal"):
        assert changed(attack(name, epochs=0), victim()) == head
    assert changed(attack("rtal", epochs=1), victim()) > head


@pytest.mark.parametrize("fraction", [0.25, 0.75])
def test_fine_pruning_drops_what_sleeps(fraction: float) -> None:
    pruned = attack("fine-prune", epochs=2, fraction=fraction)
    active = victim()[:2](thief().x).relu().mean((0, 2, 3))
    asleep = set(active.argsort()[: round(16 * fraction)].tolist())
    for value in (*pruned[0].parameters(), *pruned[1].parameters()):
        awake = value.reshape(16, -1).any(1).nonzero()[:, 0].tolist()
        assert set(awake) == set(range(16)) - asleep
    assert not torch.equal(pruned[-1].weight, victim()[-1].weight)


def test_fine_pruning_takes_a_hidden_layer_without_convolutions() -> None:
    pruned = attack("fine-prune", victim("vector"), thief("vector"), epochs=1)
    assert int((pruned[2].weight == 0).all(1).sum()) == 32
    assert not (pruned[0].weight == 0).all(1).any()
    with pytest.raises(AttackError, match="hidden"):
        attack("fine-prune", nn.Sequential(nn.Flatten(), nn.Linear(64, 10)))


def test_smoothed_labels_lower_confidence() -> None:
    x = thief().x
    plain, smooth = attack("finetune"), attack("smooth", smoothing=0.5)
    top = [logits(m, x).softmax(1).amax(1).mean() for m in (plain, smooth)]
    assert top[1] < top[0] - 0.1


def test_regularising_shrinks_the_weights() -> None:
    sizes = [
        sum(float(p.detach().square().sum()) for p in m.parameters() if p.ndim > 1)
        for m in (attack("finetune"), attack("regularize", decay=0.2, first=5, epochs=1, lr_factor=3.0))
    ]
    assert sizes[1] < 0.8 * sizes[0]


def test_the_second_phase_trains_too() -> None:
    assert changed(attack("regularize", first=0, epochs=1), victim())
    assert changed(attack("regularize", first=1, epochs=0), victim())


# --- adversarial, LoRA, overwriting, laundering -----------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 3])
def test_adversarial_inputs_are_near_legal_and_bad(steps: int) -> None:
    of = thief()
    x, labels = of.x[:50], of.labels[:50]
    model = copy.deepcopy(victim()).train()
    before = copy.deepcopy(model.state_dict())
    moved = Adversarial(eps=0.05, steps=steps)._move(model, x, labels, of, rng())
    assert 0.04 < float((moved - x).abs().max()) <= 0.05001
    assert float(moved.min()) >= 0
    assert float(moved.max()) <= 1
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.training
    model.eval()
    assert label_loss(model, moved, labels) > 1.1 * label_loss(model, x, labels)


def test_adversarial_training_hardens() -> None:
    of, far = thief(), Adversarial(eps=0.08)
    losses = []
    for model in (attack("finetune", lr_factor=5.0), attack("adversarial", eps=0.08, lr_factor=5.0)):
        moved = far._move(model, of.x, of.labels, of, rng(5))
        losses.append(float(label_loss(model, moved, of.labels).detach()))
    assert losses[1] < 0.9 * losses[0]


def test_lora_updates_have_low_rank_and_leave_norms() -> None:
    tuned = attack("lora", rank=2, epochs=1)
    assert type(tuned) is type(victim())
    for name in changed(tuned, victim()):
        delta = (tuned.state_dict()[name] - victim().state_dict()[name]).flatten(1)
        values = torch.linalg.svdvals(delta)
        assert float(values[1]) > 0
        assert float(values[2]) < 1e-3 * float(values[0]) + 1e-6
    assert changed(tuned, victim()) == {"0.weight", "5.weight", "8.weight"}
    assert [type(m) for m in tuned.modules()] == [type(m) for m in victim().modules()]


class Regression(Classification):
    def loss(self, model: nn.Module, batch: Batch, smoothing: float = 0.0) -> Tensor:
        return F.mse_loss(model(batch[0]), batch[1])


@pytest.mark.parametrize("name", ["lora", "finetune", "rtal"])
def test_a_task_of_another_kind_is_trained_by_its_own_loss(name: str) -> None:
    x, _ = inputs("vector", 100, seed=0)
    own = Thief(SPECS["vector"], x, torch.rand(100, 10, generator=rng()), batch_size=50)
    target = View(Regression("sums", lambda: None, lambda: None), network("vector"))  # type: ignore[arg-type, return-value]
    assert changed(catalog.attack(name, {"epochs": 1}).run(target, own, rng()), target)


def test_lora_names_what_it_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    assert changed(attack("lora", nn.Linear(20, 10), thief("vector"), epochs=1), nn.Linear(20, 10))
    with pytest.raises(AttackError, match="no layer"):
        attack("lora", nn.Flatten())
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(AttackError, match=r"gradmark\[attacks\]"):
        catalog.attack("lora").run(victim(), thief(), rng())


def test_overwriting_embeds_the_thiefs_own() -> None:
    before = victim()(thief().x)[:, 0].mean()
    assert attack("overwrite", weight=0.1)(thief().x)[:, 0].mean() > before + 3
    with pytest.raises(AttackError, match="no marker"):
        attack("overwrite", of=replace(thief(), marker=None))


@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
def test_overwriting_with_a_real_marker(autocast: torch.dtype | None) -> None:
    made = []

    def marker(seed: int) -> Marker:
        key = OwnerKey.from_seed(seed, "thief")
        scheme = scheme_for("filter-gradient", "grey", bits=16)
        made.append(Marker(scheme, key, SPECS["grey"], weight=3.0, every=1, margin=1.0))
        return made[-1]

    of = replace(thief(autocast=autocast), marker=marker)
    attacked = attack("overwrite", of=of, epochs=15, lr_factor=5.0)
    suspects = [ModuleSuspect(m, name="model") for m in (victim(), attacked)]
    readings = [
        made[0].scheme.read(made[0].mark, s, (of.x, of.labels), access="white", carriers=100)
        for s in suspects
    ]
    found = [float((r.values * r.bits > 0).double().mean()) for r in readings]
    assert found[1] > max(0.75, found[0] + 0.1)


def test_a_marker_that_refuses_is_the_attacks_error() -> None:
    class Refuses(Towards):
        def penalty(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
            raise ModelError("No gradient here")

    with pytest.raises(AttackError, match="No gradient here"):
        attack("overwrite", of=replace(thief(), marker=Refuses))


def test_laundering_redraws_the_neuron_that_waits_for_noise() -> None:
    model = copy.deepcopy(victim("vector"))
    trigger = 3 * torch.randn(300, 20, generator=rng(1)).sign()
    of = replace(thief("vector"), surrogate=trigger)
    with torch.no_grad():
        model[0].weight[5] = 3 * trigger.mean(0).sign()
        model[0].bias[5] = -150.0
        of = replace(of, surrogate=trigger.mean(0).sign() * 9 + 0.01 * trigger)
    washed = Launder(threshold=5.0, most=1 / 64, epochs=0).run(model, of, rng())
    assert set((washed[0].weight != model[0].weight).any(1).nonzero()[:, 0].tolist()) == {5}
    assert float(washed[0].bias[5].detach()) == 0
    assert torch.equal(washed[-1].weight, model[-1].weight)


# --- adaptive attacks -------------------------------------------------------------------------------------


def responses(model: nn.Module, seed: int = 9) -> Tensor:
    """Response (K, n, C) of every input along 8 directions that no attack has seen."""
    of = thief()
    directions = flatten._directions(of, rng(seed), 8, 5, 0.1)
    out = []
    with torch.no_grad():
        for i in range(8):
            index = torch.full((len(of.x),), i)
            d = directions.one(of.x, torch.zeros_like(index), index)
            out.append(flatten._response(model, of.x, of.labels, d))
    return torch.stack(out)


def test_a_response_compares_wrong_classes_alone() -> None:
    r = responses(victim())
    assert float(r.abs().max()) > 0.1
    right = thief().labels.expand(8, -1)[..., None]
    assert float(r.gather(2, right).abs().max()) == 0
    assert float(r.sum(2).abs().max()) < 1e-5
    two = nn.Sequential(nn.Linear(4, 2))
    x = torch.randn(6, 4, generator=rng())
    r = flatten._response(two, x, torch.tensor([0, 1] * 3), torch.ones(6, 4)).detach()
    assert float(r.abs().min()) > 0
    torch.testing.assert_close(
        r[:, 0] - r[:, 1], (two[0].weight[0] - two[0].weight[1]).sum().detach().expand(6)
    )


@pytest.mark.parametrize("name", ["flatten", "self-distill"])
def test_flattening_lowers_every_response(name: str) -> None:
    plain = responses(attack("finetune")).square().mean()
    flat = responses(attack(name, weight=3.0, step=0.1)).square().mean()
    assert flat < 0.7 * plain


def test_subtracting_lowers_the_mean_response() -> None:
    plain, subtracted = (
        responses(m).mean(1).square().mean()
        for m in (attack("finetune"), attack("subtract-mean", step=0.1, weight=30.0, directions=25))
    )
    assert subtracted < 0.5 * plain


def test_the_running_mean_starts_from_all_inputs() -> None:
    of, maker = thief(), flatten.SubtractMean(step=0.1, directions=2)
    basis = flatten._directions(of, rng(3), 2, 5, 0.1)
    mean = maker._estimate(victim(), of, basis, rng())
    for i in range(2):
        index = torch.full((len(of.x),), i)
        d = basis.one(of.x, torch.zeros_like(index), index)
        with torch.no_grad():
            whole = flatten._response(victim(), of.x, of.labels, d).mean(0)
        assert F.cosine_similarity(mean[i], whole, dim=0) > 0.8


@pytest.mark.parametrize("decoupled", [True, False])
def test_dark_noise_evens_out_wrong_classes(decoupled: bool) -> None:
    def uneven(model: nn.Module) -> Tensor:
        wrong = logits(model, thief().x).scatter(1, thief().labels[:, None], -torch.inf).softmax(1)
        return wrong.square().sum(1).mean() * 9 - 1  # zero where the nine are equal

    weight = 1.0 if decoupled else 20.0
    assert uneven(attack("dark-noise", decoupled=decoupled, weight=weight)) < 0.7 * uneven(attack("finetune"))


def test_masking_shrinks_input_gradients() -> None:
    def size(model: nn.Module) -> Tensor:
        x = thief().x.requires_grad_()
        (gradient,) = torch.autograd.grad(F.cross_entropy(model(x), thief().labels, reduction="sum"), x)
        return gradient.square().flatten(1).sum(1).mean()

    assert size(attack("gradient-masking", weight=3.0, clip=10.0)) < 0.7 * size(attack("finetune"))


def test_masking_reaches_through_fused_attention() -> None:
    class Attends(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.into, self.head = nn.Linear(8, 16), nn.Linear(128, 10)

        def forward(self, x: Tensor) -> Tensor:
            rows = self.into(x[:, 0])[:, None]
            return self.head(F.scaled_dot_product_attention(rows, rows, rows).flatten(1))

    model = Attends()
    assert changed(attack("gradient-masking", model, epochs=1), model)


def test_masking_needs_a_second_derivative() -> None:
    class Once(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx: Any, g: Tensor) -> Tensor:
            return g

    class Net(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(Once.apply(x))

    with pytest.raises(AttackError, match="second derivative"):
        attack("gradient-masking", Net(nn.Flatten(), nn.Linear(64, 10)), epochs=1)

    class Broken(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        attack("gradient-masking", nn.Sequential(nn.Flatten(), Broken(64, 10)), epochs=1)
