"""Rewrites that leave the function alone, on networks with every kind of joint between two layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from conformance import KEY, SPECS, inputs, network, pool, same_world, scheme_for, white, world
from gradmark import catalog
from gradmark.bench.networks import DigitsNet
from gradmark.errors import AttackError
from gradmark.passages import Passage, pairs, passages
from gradmark.protocols import Access, Thief
from gradmark.suspects.module import weights_digest


class Block(nn.Module):
    """Two convolutions and a parameter-free shortcut, with functional activations."""

    def __init__(self, inner: int, outer: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inner, outer, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outer)
        self.conv2 = nn.Conv2d(outer, outer, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outer)
        self.stride, self.extra = stride, outer - inner

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.extra or self.stride > 1:
            pad = (0, 0, 0, 0, self.extra // 2, self.extra - self.extra // 2)
            x = F.pad(x[:, :, :: self.stride, :: self.stride], pad)
        return F.relu(x + y)


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 8, 3, 1, 1, bias=False), nn.BatchNorm2d(8)
        self.blocks = nn.Sequential(Block(8, 8, 1), Block(8, 16, 2))
        self.head = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn(self.conv((x - 0.473) / 0.25)))
        return self.head(self.blocks(x).mean((2, 3)))


class Mixed(nn.Module):
    """Methods, functions, a batch norm after the activation, two flattenings, tanh and leaky ReLU."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(1, 6, 3), nn.Conv2d(6, 5, 3, padding=1)
        self.norm = nn.BatchNorm2d(6)
        self.third, self.fourth, self.fifth = nn.Linear(45, 12), nn.Linear(12, 9), nn.Linear(9, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.dropout(self.norm(self.first(x).relu()), training=self.training)
        x = F.max_pool2d(F.leaky_relu(self.second(x), 0.1), 2)
        x = torch.tanh(self.third(x.view(x.size(0), -1)))
        return self.fifth(F.gelu(self.fourth(x)))


MAKERS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "digits": (DigitsNet, "grey"),
    "mlp": (lambda: network("vector"), "vector"),
    "mlp-norm": (
        lambda: nn.Sequential(nn.Linear(20, 30), nn.BatchNorm1d(30), nn.Tanh(), nn.Linear(30, 10)),
        "vector",
    ),
    "residual": (Residual, "colour"),
    "mixed": (Mixed, "grey"),
}
REWRITES: dict[str, dict[str, Any]] = {
    "permute": {},
    "rescale": {"top": 30.0},
    "flip-signs": {},
    "dummy": {"share": 0.4},
    "fold": {},
}
IMPOSSIBLE = {("mlp", "flip-signs"), ("mlp", "fold"), ("mixed", "fold"), ("mlp-norm", "rescale")}
POSSIBLE = [(m, r) for m in MAKERS for r in REWRITES if (m, r) not in IMPOSSIBLE]


def model_of(name: str, seed: int = 0) -> nn.Module:
    """With batch norms that have seen something."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = MAKERS[name][0]()
        for part in model.modules():
            if isinstance(part, nn.BatchNorm1d | nn.BatchNorm2d):
                for value, low in ((part.weight, 0.5), (part.bias, -0.5), (part.running_mean, -0.5)):
                    nn.init.uniform_(value, low, low + 1)
                nn.init.uniform_(part.running_var, 0.5, 1.5)
    return model.eval()


def rewrite(model: nn.Module, name: str, rewriting: str, seed: int = 3) -> nn.Module:
    domain = MAKERS[name][1]
    thief = Thief(SPECS[domain], *inputs(domain, 20, seed=0))
    return catalog.attack(rewriting, REWRITES[rewriting]).run(model, thief, generator(seed))


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def close(a: Tensor, b: Tensor, rel: float = 1e-4) -> bool:
    return a.shape == b.shape and bool(((a - b).abs() <= rel * a.abs().max()).all())


@pytest.mark.parametrize(("name", "rewriting"), POSSIBLE)
def test_function_preserving_rewrites_leave_outputs_gradients_and_readings(name: str, rewriting: str) -> None:
    """Theorem: the input gradient depends only on the function, so a reading does too.

    Two networks with f(x) = g(x) for all x have equal gradients for all x, whatever their weights; white
    and black readings are made of gradients and scores at inputs chosen by the key. So no rewriting that
    keeps the function can move a reading by more than rounding, and none can remove the mark.
    """
    model, domain = model_of(name), MAKERS[name][1]
    before = world(model)
    twin = rewrite(model, name, rewriting)
    assert same_world(before, world(model))
    assert type(twin) is type(model)
    assert weights_digest(twin) != weights_digest(model)
    x, labels = pool(domain)
    a, b = white(model), white(twin)
    assert close(a.query(x), b.query(x))
    v = torch.randn(len(x), 10, generator=generator(0))
    assert close(a.vjp(x, v), b.vjp(x, v))
    scheme = scheme_for("filter-gradient", domain)
    mark = scheme.mark(KEY, SPECS[domain])
    access: Access
    for access in ("white", "black"):
        one, two = (
            scheme.read(mark, s, (x, labels), access=access, carriers=50, queries=1000).values for s in (a, b)
        )
        assert close(one, two, 1e-3)


@pytest.mark.parametrize(("name", "rewriting"), sorted(IMPOSSIBLE))
def test_what_a_network_does_not_allow_is_refused(name: str, rewriting: str) -> None:
    with pytest.raises(AttackError, match="Expected"):
        rewrite(model_of(name), name, rewriting)


@pytest.mark.parametrize("rewriting", ["permute", "rescale", "flip-signs"])
@pytest.mark.parametrize("name", ["digits", "residual"])
def test_the_file_still_fits_the_class(name: str, rewriting: str) -> None:
    model = model_of(name)
    again = model_of(name, seed=1)
    again.load_state_dict(rewrite(model, name, rewriting).state_dict())
    x = pool(MAKERS[name][1])[0]
    assert close(model(x).detach(), again(x).detach())


def test_passages_of_a_residual_network() -> None:
    """What feeds an addition has other users: inside the blocks alone channels are free."""
    found = passages(model_of("residual"), pool("colour")[0])
    assert found == [
        Passage(f"blocks.{i}.conv1", (f"blocks.{i}.bn1",), f"blocks.{i}.conv2", 1, True, False)
        for i in (0, 1)
    ]
    names = [pair[0] for pair in pairs(model_of("residual"), pool("colour")[0])]
    assert names == ["conv", *(f"blocks.{i}.conv{j}" for i in (0, 1) for j in (1, 2))]


def test_passages_through_functions_and_methods() -> None:
    found = passages(model_of("mixed"), pool("grey")[0])
    assert found == [
        Passage("first", ("norm",), "second", 1, True, True),
        Passage("second", (), "third", 9, True, False),
        Passage("third", (), "fourth", 1, False, True),
        Passage("fourth", (), "fifth", 1, False, False),
    ]


def test_every_neuron_moves_and_scales() -> None:
    """All of the digits net's hidden layers take part, the first too."""
    model = model_of("digits")
    for rewriting, part in (("permute", "weight"), ("rescale", "bias")):
        twin = rewrite(model, "digits", rewriting)
        for old, new in zip(model.modules(), twin.modules(), strict=True):
            if isinstance(old, nn.BatchNorm2d):
                assert not torch.equal(getattr(old, part), getattr(new, part))


@pytest.mark.parametrize(("name", "rewriting"), POSSIBLE)
def test_a_mark_in_the_paths_through_hidden_units_stays_too(name: str, rewriting: str) -> None:
    """It lies in the weights and not in the function, and yet no rewriting of hidden units moves it."""
    model, domain = model_of(name), MAKERS[name][1]
    scheme: Any = catalog.scheme("path-weights").calibrated(KEY, SPECS[domain], white(model), pool(domain))  # type: ignore[attr-defined]
    mark = scheme.mark(KEY, SPECS[domain])
    a, b = (
        scheme.read(mark, white(m), pool(domain), access="white", carriers=100).values
        for m in (model, rewrite(model, name, rewriting))
    )
    assert close(a, b, 1e-3)


def test_dead_neurons_do_nothing_and_can_lead_anywhere() -> None:
    model = model_of("digits")
    thief = Thief(SPECS["grey"], *inputs("grey", 20, seed=0))
    twin = catalog.attack("dummy", {"dead": True}).run(model, thief, generator(3))
    assert isinstance(twin, nn.Sequential)
    dead = (twin[1].bias < -100).nonzero()[:, 0]
    assert len(dead) == 8
    assert (twin[3].weight[:, dead].abs().amax((0, 2, 3)) > 0).all()
    for other, words in ((nn.Tanh(), "change the model's function"), (nn.ReLU(), "Nothing shifts")):
        mlp = nn.Sequential(nn.Linear(20, 8, bias=isinstance(other, nn.Tanh)), other, nn.Linear(8, 10)).eval()
        with pytest.raises(AttackError, match=words):
            catalog.attack("dummy", {"dead": True}).run(
                mlp, Thief(SPECS["vector"], *inputs("vector", 20, seed=0)), generator(0)
            )


def test_dummies_widen_by_share() -> None:
    twin = rewrite(model_of("digits"), "digits", "dummy")
    assert isinstance(twin, nn.Sequential)
    assert [len(twin[i].weight) for i in (0, 3, 6)] == [45, 90, 90]
    assert twin[4].num_features == twin[6].in_channels == twin[3].out_channels == 90
    assert twin[-1].in_features == 90 * 16
    dead = (twin[-1].weight.reshape(10, 90, 16) == 0).all(2).all(0)
    assert not dead.any()  # 26 more: thirteen pairs of twins
    assert (twin[3].weight.reshape(90, 45, 9) == 0).all(2).all(0).sum() == 1  # 13 more: one is left over


def test_folding_leaves_no_batch_norm() -> None:
    twin = rewrite(model_of("residual"), "residual", "fold")
    assert not any(isinstance(part, nn.BatchNorm2d) for part in twin.modules())


class Branching(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x


class Shared(nn.Module):
    """One layer that is used twice, and one whose output is used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.same, self.last, self.more = nn.Linear(20, 20), nn.Linear(20, 10), nn.Linear(20, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.same(torch.relu(self.same(x))))
        return self.last(x) + self.more(x)


class Fixed(nn.Sequential):
    """Its forward names a width."""

    def forward(self, x: Tensor) -> Tensor:
        return self[1](torch.relu(self[0](x)).view(-1, 8))


@pytest.mark.parametrize(
    ("model", "rewriting", "words"),
    [
        (Branching(), "permute", "can't trace"),
        (Shared(), "permute", "two layers"),
        (nn.Sequential(nn.Linear(20, 10)), "dummy", "two layers"),
        (nn.Sequential(nn.Linear(20, 8), nn.Softmax(1), nn.Linear(8, 10)), "permute", "two layers"),
        (Fixed(nn.Linear(20, 8), nn.Linear(8, 10)), "dummy", "rewritten model fails"),
    ],
    ids=["branching", "shared", "one layer", "softmax", "fixed width"],
)
def test_models_that_cannot_be_rewritten(model: nn.Module, rewriting: str, words: str) -> None:
    thief = Thief(SPECS["vector"], *inputs("vector", 20, seed=0))
    with pytest.raises(AttackError, match=words):
        catalog.attack(rewriting).run(model, thief, generator(0))
