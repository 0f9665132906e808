"""Marks in products of weights: against a slow oracle, under rewrites, and what is refused."""

from __future__ import annotations

import copy
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from conformance import KEY, SPECS, inputs, network, pool, uniform_p, white
from gradmark import catalog
from gradmark.bench.networks import Block, DigitsNet
from gradmark.errors import MismatchError, UsageError
from gradmark.keys import OwnerKey
from gradmark.layer_chains import layer_chains
from gradmark.protocols import Thief
from gradmark.schemes.path_weights import PathWeights
from gradmark.stats import ks_uniform

SPEC = SPECS["grey"]
X = pool("grey")[0]


class Shortcuts(nn.Module):
    """Two residual blocks for 8x8 images, one of them narrower than it is wide."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a, self.b, self.head = (
            nn.Conv2d(1, 8, 3),
            Block(8, 8, 1),
            Block(8, 16, 2),
            nn.Linear(16, 10),
        )

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.head(self.b(self.a(self.stem(x))).mean((2, 3)))
        return scores


def lived(model: nn.Module, seed: int = 0) -> nn.Module:
    """With norms that have seen something and scale differently, as after a training."""
    torch.manual_seed(seed)
    for part in model.modules():
        if isinstance(part, nn.BatchNorm2d):
            nn.init.normal_(part.weight)
            nn.init.normal_(part.bias)
            part.running_var.uniform_(0.5, 2.0)  # type: ignore[union-attr, operator]
            part.running_mean.normal_()  # type: ignore[union-attr, operator]
    return model.eval()


PLAIN: Any = PathWeights(64)


def read(model: nn.Module, scheme: Any = PLAIN) -> Tensor:
    found: Tensor = scheme.read(
        scheme.mark(KEY, SPEC), white(model), pool("grey"), access="white", carriers=len(X)
    ).values
    return found


def slope(x: np.ndarray[Any, Any], y: np.ndarray[Any, Any]) -> float:
    """By another way than the one under test; of units that stand still none."""
    return float(np.polyfit(x, y, 1)[0]) if np.ptp(x) > 1e-9 else 0.0


def thief() -> Thief:
    nothing: Any = None
    return Thief(SPEC, *pool("grey"), nothing, nothing, nothing, nothing, nothing)


# --- what is read -----------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=25)
@given(st.lists(st.integers(1, 5), min_size=3, max_size=5), st.integers(0, 10**6), st.booleans())
def test_a_chain_reads_what_all_its_paths_do_one_by_one(widths: list[int], seed: int, bias: bool) -> None:
    """Slow oracle: every way through the hidden units by itself, its weights multiplied, and summed."""
    torch.manual_seed(seed)
    layers: list[nn.Module] = [nn.Flatten(), nn.Linear(64, widths[0], bias)]
    for a, b in pairwise(widths):
        layers += [nn.ReLU(), nn.Linear(a, b, bias)]
    model, scheme = nn.Sequential(*layers), PathWeights(8)
    mark = scheme.mark(KEY, SPEC)
    parts = [m.weight.detach().double() for m in layers if isinstance(m, nn.Linear)]
    n, whole = len(parts), torch.zeros(widths[-1], 64, dtype=torch.float64)
    u, h = mark.vectors("outputs/0", widths[-1]), mark.vectors("inputs/0", 64)
    g = [mark.vectors(f"positions/0/{i}", 1)[:, 0] for i in range(n)]
    with torch.no_grad():  # what goes into each ReLU, and what comes out of it
        ends = [[model[:i](X).double().numpy() for i in (j, j + 1)] for j in range(2, len(layers), 2)]
    on = [torch.tensor([slope(a[:, k], b[:, k]) for k in range(a.shape[1])]) for a, b in ends]
    for way in torch.cartesian_prod(*(torch.arange(w) for w in widths)).reshape(-1, len(widths)).tolist():
        value = parts[0][way[0]]
        for i in range(1, n):
            value = value * parts[i][way[i], way[i - 1]] * on[i - 1][way[i - 1]]
        whole[way[-1]] += value
    expected = torch.stack(g).prod(0) * ((u @ whole) * h).sum(1) / whole.norm().clamp_min(1e-30)
    torch.testing.assert_close(read(model, scheme), 16 * torch.tanh(expected / 16), rtol=1e-4, atol=1e-6)


def test_kernels_norms_and_positions_count() -> None:
    """A residual block, by an explicit sum over hidden units and positions."""
    model, scheme = lived(nn.Sequential(Block(1, 4, 1), nn.Flatten())), PathWeights(16)
    mark, block = scheme.mark(KEY, SPEC), model[0]
    assert isinstance(block, Block)
    assert layer_chains(model, X) == ((("0.conv1", "0.bn1"), ("0.conv2", "0.bn2")),)
    a, b = ((bn.weight / (bn.running_var + 1e-5).sqrt()).detach().double() for bn in (block.bn1, block.bn2))
    one, two = (conv.weight.detach().double().flatten(2) for conv in (block.conv1, block.conv2))
    with torch.no_grad():
        before = block.bn1(block.conv1(X)).double()
    on = [slope(before[:, k].flatten().numpy(), before[:, k].relu().flatten().numpy()) for k in range(4)]
    u, h = mark.vectors("outputs/0", 4), mark.vectors("inputs/0", 1)
    g1, g2 = (mark.vectors(f"positions/0/{i}", 9) for i in (0, 1))
    whole = torch.zeros(4, 9, 9, dtype=torch.float64)  # outputs, positions of either kernel; one input
    for hidden in range(4):
        leads_on = b[:, None] * two[:, hidden] * on[hidden]
        whole += leads_on[:, :, None] * a[hidden] * one[hidden, 0]
    values = torch.einsum("opq,bo,bp,bq,b->b", whole, u, g2, g1, h[:, 0])
    expected = values / whole.norm()
    torch.testing.assert_close(read(model, scheme), 16 * torch.tanh(expected / 16), rtol=1e-4, atol=1e-6)


def test_chains_end_where_channels_have_names() -> None:
    assert [len(chain) for chain in layer_chains(Shortcuts(), X)] == [2, 2], (
        "a stream's channels are no hidden units"
    )
    (whole,) = layer_chains(DigitsNet(), X)
    assert whole == (("0", "1"), ("3", "4"), ("6", "7"), ("10",))


def test_every_chain_weighs_the_same() -> None:
    model = Shortcuts().eval()
    before = read(model, PathWeights(1024))
    with torch.no_grad():
        model.b.conv2.weight *= 100.0
    torch.testing.assert_close(read(model, PathWeights(1024)), before, rtol=1e-4, atol=1e-5)
    assert 0.8 < float(before.std()) < 1.2, "in standard deviations over keys"


def test_bits_and_vectors_hang_on_the_list_of_chains() -> None:
    """Else who writes the list after seeing a suspect could leave out the chains that disagree."""
    model = Shortcuts().eval()
    whole: Any = PathWeights(64).calibrated(KEY, SPEC, white(model), pool("grey"))
    less = PathWeights(64, whole.chains[:1])
    marks = [s.mark(KEY, SPEC) for s in (whole, less, PathWeights(64))]
    for one, other in pairwise([*marks, marks[0]]):
        assert not torch.equal(one.bits, other.bits)
        assert not torch.equal(one.vectors("outputs/0", 8), other.vectors("outputs/0", 8))


# --- rewrites ---------------------------------------------------------------------------------------------


REWRITES = [(name, {}) for name in ("permute", "rescale", "flip-signs", "dummy", "fold")]


@pytest.mark.parametrize(
    ("attack", "options"), [*REWRITES, ("dummy", {"dead": True}), ("permute", {"streams": True})]
)
@pytest.mark.parametrize("kind", [Shortcuts, DigitsNet])
def test_no_rewrite_of_hidden_units_moves_a_reading(
    kind: type[nn.Module], attack: str, options: dict[str, Any]
) -> None:
    """Theorem: what happens to a hidden unit's incoming weights is undone in its outgoing ones, and the
    products are summed over all units; one that does nothing adds nothing."""
    model = lived(kind())
    scheme = PathWeights(64).calibrated(KEY, SPEC, white(model), pool("grey"))
    twin = catalog.attack(attack, options).run(model, thief(), torch.Generator().manual_seed(1))
    changed = {n: p for n, p in twin.named_parameters() if n in (old := dict(model.named_parameters()))}
    assert any(p.shape != old[n].shape or not torch.equal(p, old[n]) for n, p in changed.items())
    torch.testing.assert_close(read(twin, scheme), read(model, scheme), rtol=1e-3, atol=1e-4)


def streams_renamed(model: Shortcuts, seed: int) -> Shortcuts:
    """The same function: both residual streams' channels in another order, each times a factor of its own."""
    twin, (pick, factors) = copy.deepcopy(model), (torch.Generator().manual_seed(seed), 0.1)
    order, scale = torch.randperm(8, generator=pick), torch.rand(8, generator=pick) * 3 + factors
    fresh = torch.tensor([0, 1, 2, 3, 12, 13, 14, 15])  # the others are those of the first stream, padded in
    wide, wide_scale = torch.arange(16), torch.rand(16, generator=pick) * 3 + factors
    wide[4:12], wide_scale[4:12] = order + 4, scale
    wide[fresh] = fresh[torch.randperm(8, generator=pick)]
    with torch.no_grad():
        twin.stem.weight.copy_(model.stem.weight[order] * scale[:, None, None, None])
        assert twin.stem.bias is not None
        assert model.stem.bias is not None
        twin.stem.bias.copy_(model.stem.bias[order] * scale)
        for block, old, first, into, out, grown in (
            (twin.a, model.a, order, scale, order, scale),
            (twin.b, model.b, order, scale, wide, wide_scale),
        ):
            block.conv1.weight.copy_(old.conv1.weight[:, first] / into[:, None, None])
            block.conv2.weight.copy_(old.conv2.weight[out])
            for name, value in dict(block.bn2.named_parameters()).items():
                value.copy_(old.bn2.get_parameter(name)[out] * grown)
            block.bn2.running_mean.copy_(old.bn2.running_mean[out])  # type: ignore[union-attr, arg-type, index, operator]
            block.bn2.running_var.copy_(old.bn2.running_var[out])  # type: ignore[union-attr, arg-type, index, operator]
        twin.head.weight.copy_(model.head.weight[:, wide] / wide_scale)
    return twin


@pytest.mark.parametrize("seed", range(5))
def test_renaming_a_residual_stream_moves_nothing(seed: int) -> None:
    """Theorem: channels are told by what they do, and so found in whatever order and on whatever scale."""
    model = lived(Shortcuts(), seed)
    assert isinstance(model, Shortcuts)
    scheme = PathWeights(64).calibrated(KEY, SPEC, white(model), pool("grey"))
    twin = streams_renamed(model, seed)
    torch.testing.assert_close(twin(X), model(X), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(read(twin, scheme), read(model, scheme), rtol=1e-3, atol=1e-3)
    blind: Any = PathWeights(64, scheme.chains)  # without profiles it would
    assert not torch.allclose(read(twin, blind), read(model, blind), atol=0.5)


def test_with_other_data_than_the_mark_was_calibrated_with_channels_keep_their_places() -> None:
    """Whether a renamed stream is followed hangs on the data alone, which the mark knows by a digest."""
    model = lived(Shortcuts())
    assert isinstance(model, Shortcuts)
    scheme: Any = PathWeights(64).calibrated(KEY, SPEC, white(model), pool("grey"))
    mark, other = scheme.mark(KEY, SPEC), inputs("grey", 200, seed=9)
    places = replace(mark, profiles=())

    def values(of: Any, suspect: nn.Module, data: Any) -> Tensor:
        return scheme.read(of, white(suspect), data, access="white", carriers=50).values

    assert torch.equal(values(mark, model, other), values(places, model, other))
    assert not torch.equal(values(mark, model, pool("grey")), values(places, model, pool("grey")))
    shuffled = torch.randperm(200, generator=torch.Generator().manual_seed(1))
    same = tuple(part[shuffled] for part in pool("grey"))
    assert not torch.equal(values(mark, model, same), values(places, model, same)), "the order is nothing"
    twin = streams_renamed(model, 3)
    assert torch.equal(values(mark, twin, other), values(places, twin, other))
    assert catalog.scheme("path-weights", scheme.parameters()) == scheme
    assert len(scheme.inputs) == 16


def test_other_keys_read_uniformly_where_channels_are_matched() -> None:
    """Each key has its own profiles of an unmarked network; the suspect is that network, renamed."""
    model = lived(Shortcuts())
    assert isinstance(model, Shortcuts)
    suspect, generator, found = white(streams_renamed(model, 3)), np.random.default_rng(5), []
    for seed in range(150):
        key = OwnerKey.from_seed(seed)
        scheme = PathWeights(64).calibrated(key, SPEC, white(model), pool("grey"))
        reading = scheme.read(scheme.mark(key, SPEC), suspect, pool("grey"), access="white", carriers=40)
        found.append(uniform_p(reading, generator))
    assert ks_uniform(found)[1] > 0.001


def test_other_weights_do() -> None:
    model = lived(Shortcuts())
    before = read(model)
    with torch.no_grad():
        model.b.conv2.weight += 0.1 * torch.randn_like(model.b.conv2.weight)
    assert not torch.allclose(read(model), before, rtol=0.1, atol=0.1)


class Wordy(nn.Module):
    """What can't be traced: two feed-forward layers over the rows of an image, behind a branch."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.head = nn.Linear(8, 24), nn.Linear(24, 8), nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > -1e9:
            x = x[:, 0] + self.down(torch.nn.functional.gelu(self.up(x[:, 0])))
        scores: Tensor = self.head(x.mean(1))
        return scores


def test_chains_may_be_given_for_what_cannot_be_traced() -> None:
    model = Wordy().eval()
    with pytest.raises(MismatchError, match="can't be told"):
        PathWeights().calibrated(KEY, SPEC, white(model), pool("grey"))
    scheme = PathWeights(64, chains=[[["up"], ["down"]]])  # type: ignore[arg-type]
    assert scheme.calibrated(KEY, SPEC, white(model), pool("grey")).chains == scheme.chains
    before, order = read(model, scheme), torch.randperm(24, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        for value in (model.up.weight, model.up.bias):
            value.copy_(value[order])
        model.down.weight.copy_(model.down.weight[:, order])
    torch.testing.assert_close(read(model, scheme), before, rtol=1e-4, atol=1e-5)


# --- what is refused --------------------------------------------------------------------------------------


def test_absent_and_reshaped_layers_are_named() -> None:
    scheme = PathWeights().calibrated(KEY, SPEC, white(Shortcuts().eval()), pool("grey"))
    with pytest.raises(MismatchError, match=r"missing or reshaped.*a\.conv1\.weight.*nothing"):
        read(DigitsNet().eval(), scheme)
    cut = Shortcuts().eval()
    cut.a.conv2 = nn.Conv2d(5, 8, 3)
    with pytest.raises(MismatchError, match=r"a\.conv2\.weight with 8 inputs"):
        read(cut, scheme)
    cut = Shortcuts().eval()
    cut.a.bn1 = nn.BatchNorm2d(3)
    with pytest.raises(MismatchError, match="norm in model doesn't fit"):
        read(cut, scheme)
    with pytest.raises(UsageError):
        PathWeights(bits=0).mark(KEY, SPEC)


def test_without_a_module_it_says_what_is_missing() -> None:
    class Closed:
        """Weights, and no module to trace."""

        name, digest = "closed", "sha256:"

        def query(self, x: Tensor) -> Tensor:
            return torch.zeros(len(x), 10)

        def weights(self, *, buffers: bool = False) -> dict[str, Tensor]:
            return white(network("grey")).weights(buffers=buffers)

    scheme = PathWeights()
    with pytest.raises(MismatchError, match="a PyTorch module"):
        scheme.read(scheme.mark(KEY, SPEC), Closed(), pool("grey"), access="white", carriers=1)


def test_in_an_ensemble_a_stranger_of_another_architecture_is_read_by_the_other_parts() -> None:
    ensemble = catalog.scheme("class-contrast,path-weights").calibrated(  # type: ignore[attr-defined]
        KEY, SPEC, white(Shortcuts().eval()), pool("grey")
    )
    other = white(DigitsNet().eval())
    reading = ensemble.read(ensemble.mark(KEY, SPEC), other, pool("grey"), access="white", carriers=100)
    contrasts, paths = reading.values.split(list(reading.parts))
    assert contrasts.abs().min() > 0
    assert not paths.any()


def test_folding_moves_nothing_whatever_a_norm_adds_to_its_variance() -> None:
    model, scheme = lived(nn.Sequential(Block(1, 4, 1), nn.Flatten())), PathWeights(16)
    for norm in (model[0].bn1, model[0].bn2):
        norm.eps = 0.05
    folded = catalog.attack("fold").run(model, thief(), torch.Generator())
    torch.testing.assert_close(folded(X), model(X), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(read(folded, scheme), read(model, scheme), rtol=1e-4, atol=1e-5)
