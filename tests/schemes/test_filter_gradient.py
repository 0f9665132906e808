"""White-box readings against a slow oracle: loops over carriers, directions and taps in float64."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from conformance import CLASSES, KEY, SPECS, Counting, inputs, network, scheme_for, white
from gradmark.errors import MismatchError, UsageError
from gradmark.protocols import Access, ModelSpec
from gradmark.schemes.filter_gradient import FilterGradient, FilterGradientMark

Array = np.ndarray
H = 1e-4


def direction(mark: FilterGradientMark, x: Array, label: int, i: int) -> Array:
    """Direction ``i`` of the label's group at one input, tap by tap."""
    spec, group = mark.spec, label % mark.directions.groups
    if spec.domain == "vector":
        pattern = mark.directions.patterns[group, i].double().numpy()
        return pattern.reshape(x.shape) * mark.directions.step * spec.scale
    kernel = mark.directions.kernels[group, i].double().numpy()
    axes = kernel.ndim - 2
    planes = x.reshape(-1, *x.shape[x.ndim - axes :])
    half = kernel.shape[2] // 2
    padded = np.pad(planes, [(0, 0), *[(half, half)] * axes], mode="reflect")
    out = np.zeros_like(planes)
    for o, c in itertools.product(range(len(planes)), repeat=2):
        for tap in itertools.product(*[range(k) for k in kernel.shape[2:]]):
            window = tuple(slice(t, t + s) for t, s in zip(tap, planes.shape[1:], strict=True))
            out[o] += kernel[(o, c, *tap)] * padded[(c, *window)]
    out -= out.mean()
    out /= np.abs(out) + 0.5 * np.abs(out).mean()
    loudness = np.sqrt((x**2).mean()) if spec.domain == "signal" else spec.scale
    return (out / np.sqrt((out**2).mean()) * mark.directions.step * loudness).reshape(x.shape)


def slow_reading(mark: FilterGradientMark, model: nn.Module, x: Array, labels: Array, per: int) -> Array:
    """Mean over carriers of central differences of each contrast along each direction."""
    count, n = mark.contrasts.shape[1], len(mark.bits)
    per = min(per, count)
    sums, seen = np.zeros(n), np.zeros(n)
    for position, carrier in enumerate(mark.order(len(x)).tolist()):
        for a in range(per):
            l = (position * per + a) % count  # noqa: E741
            w = mark.contrasts[labels[carrier], l].double().numpy()
            for i in range(mark.directions.n):
                bit = i * count + l
                if bit >= n:
                    continue
                d = direction(mark, x[carrier], int(labels[carrier]), i)
                both = torch.from_numpy(np.stack([x[carrier] + H * d, x[carrier] - H * d]))
                with torch.no_grad():
                    plus, minus = model(both).numpy()
                sums[bit] += (w * plus).sum() / (2 * H) - (w * minus).sum() / (2 * H)
                seen[bit] += 1
    return sums / np.maximum(seen, 1)


@pytest.mark.parametrize("domain", list(SPECS))
@pytest.mark.parametrize(("bits", "per", "groups"), [(64, 2, 1), (37, 8, 3)])
def test_white_box_reading_equals_the_slow_oracle(domain: str, bits: int, per: int, groups: int) -> None:
    scheme = scheme_for("filter-gradient", domain, bits=bits, contrasts_per_carrier=per, class_groups=groups)
    assert isinstance(scheme, FilterGradient)
    model = network(domain, seed=5, activation=nn.Tanh).double()
    x, labels = inputs(domain, 5, seed=4)
    mark = scheme.mark(KEY, SPECS[domain])
    reading = scheme.read(mark, white(model), (x, labels), access="white", carriers=5)
    oracle = slow_reading(mark, model, x.double().numpy(), labels.numpy(), per)
    assert np.abs(oracle).max() > 0
    np.testing.assert_allclose(reading.values.numpy(), oracle, rtol=2e-4, atol=2e-4 * np.abs(oracle).max())


@pytest.mark.parametrize("domain", list(SPECS))
def test_contrasts_leave_the_right_class_alone(domain: str) -> None:
    """Orthogonal, of one size, summing to zero: a shift of all logits can't be seen, nor the right one."""
    mark = scheme_for("filter-gradient", domain).mark(KEY, SPECS[domain])
    for label in range(CLASSES):
        w = mark.contrasts[label].double()
        torch.testing.assert_close(w.sum(1), torch.zeros(len(w)).double(), atol=1e-6, rtol=0)
        assert float(w[:, label].abs().max()) < 1e-12
        torch.testing.assert_close(w @ w.T, 2 * torch.eye(len(w)).double(), atol=1e-5, rtol=0)


@pytest.mark.parametrize("domain", list(SPECS))
def test_directions_have_the_stated_amplitude(domain: str) -> None:
    scheme = scheme_for("filter-gradient", domain)
    assert isinstance(scheme, FilterGradient)
    mark = scheme.mark(KEY, SPECS[domain])
    x, labels = inputs(domain, 6, seed=4)
    d = mark.directions.all(x, mark.group(labels))
    size = d.flatten(2).square().mean(2).sqrt()
    wanted = scheme.step * torch.ones(len(x))
    if SPECS[domain].domain == "signal":
        wanted = wanted * x.flatten(1).square().mean(1).sqrt()
    if SPECS[domain].domain == "vector":  # orthogonal patterns: the mean square is 1 in each
        gram = d.flatten(2) @ d.flatten(2).transpose(1, 2) / d[0, 0].numel()
        torch.testing.assert_close(gram, scheme.step**2 * torch.eye(d.shape[1]).expand_as(gram))
    torch.testing.assert_close(size, wanted[:, None].expand_as(size), rtol=1e-4, atol=1e-7)
    one = mark.directions.one(x, mark.group(labels), torch.full((len(x),), 2))
    torch.testing.assert_close(one, d[:, 2])


@pytest.mark.parametrize("carriers", [7, 8, 9, 15])
def test_no_query_is_sent_twice(carriers: int) -> None:
    """Every carrier meets every direction once before any meets one again, whatever the numbers share."""

    class Recording(Counting):
        def query(self, x: torch.Tensor) -> torch.Tensor:
            seen.extend(row.numpy().tobytes() for row in x)
            return super().query(x)

    seen: list[bytes] = []
    scheme = scheme_for("filter-gradient", "vector")
    mark, pool = scheme.mark(KEY, SPECS["vector"]), inputs("vector", carriers, seed=4)
    suspect = Recording(network("vector"))
    reading = scheme.read(mark, suspect, pool, access="black", carriers=carriers, queries=10**6)
    assert reading.queries == len(set(seen)) == 2 * carriers * mark.directions.n


def test_silence_has_no_direction() -> None:
    mark = scheme_for("filter-gradient", "mono").mark(KEY, SPECS["mono"])
    d = mark.directions.all(torch.zeros(2, 256), torch.tensor([0, 0]))
    assert float(d.abs().max()) == 0


@pytest.mark.parametrize(
    ("scheme", "spec"),
    [
        (FilterGradient(bits=0), SPECS["grey"]),
        (FilterGradient(contrasts=0), SPECS["grey"]),
        (FilterGradient(bound=-1.0), SPECS["grey"]),
        (FilterGradient(bound=float("inf")), SPECS["grey"]),
        (FilterGradient(step=0.0), SPECS["grey"]),
        (FilterGradient(step=1.5), SPECS["grey"]),
        (FilterGradient(reading_step=-0.1), SPECS["grey"]),
        (FilterGradient(reading_step=1.5), SPECS["grey"]),
        (FilterGradient(bits=10_000), SPECS["grey"]),
        (FilterGradient(kernel_size=4), SPECS["grey"]),
        (FilterGradient(kernel_size=17), SPECS["grey"]),
        (FilterGradient(), replace(SPECS["grey"], n_classes=1)),
    ],
)
def test_impossible_settings_are_refused(scheme: FilterGradient, spec: ModelSpec) -> None:
    with pytest.raises(UsageError):
        scheme.mark(KEY, spec)


@pytest.mark.parametrize("n_classes", [2, 3, 50])
def test_any_number_of_classes_has_a_mark(n_classes: int) -> None:
    spec = ModelSpec("vector", (40,), n_classes)
    scheme = FilterGradient(bits=40)
    mark = scheme.mark(KEY, spec)
    model = nn.Sequential(nn.Linear(40, 30), nn.Tanh(), nn.Linear(30, n_classes))
    x, labels = torch.randn(60, 40), torch.randint(n_classes, (60,))
    for access in ("white", "black"):
        reading = scheme.read(mark, white(model), (x, labels), access=access, carriers=60, queries=4000)
        assert reading.values.shape == (40,)
        assert int((reading.values == 0).sum()) == 0


def test_data_that_doesnt_fit_is_refused() -> None:
    scheme = FilterGradient()
    mark, model = scheme.mark(KEY, SPECS["colour"]), white(network("colour"))
    x, labels = inputs("colour", 20, seed=1)
    with pytest.raises(MismatchError, match="data doesn't fit"):
        scheme.read(mark, model, (x[:, :, :8], labels), access="white", carriers=10)
    with pytest.raises(MismatchError, match="0 to 9"):
        scheme.read(mark, model, (x, labels + 1), access="white", carriers=10)
    with pytest.raises(MismatchError, match="0 to 9"):
        scheme.read(mark, model, (x, labels - 1), access="white", carriers=10)
    assert "FilterGradientMark(64 bits" in repr(mark)


def test_a_bounded_reading_bears_answers_that_jump() -> None:
    """One answer in twenty is nonsense: bounded, the reading is much nearer to that of honest answers."""

    class Jumpy(Counting):
        def query(self, x: torch.Tensor) -> torch.Tensor:
            scores = super().query(x)
            noise = torch.Generator().manual_seed(len(x))
            jumps = torch.rand(len(x), 1, generator=noise) < 0.05
            return scores + jumps * 30 * torch.randn(scores.shape, generator=noise)

    plain = scheme_for("filter-gradient", "vector")
    assert isinstance(plain, FilterGradient)
    mark, pool = plain.mark(KEY, SPECS["vector"]), inputs("vector", 100, seed=4)

    def read(scheme: FilterGradient, suspect: Counting) -> torch.Tensor:
        return scheme.read(mark, suspect, pool, access="black", carriers=100, queries=2000).values

    honest = read(plain, Counting(network("vector")))
    far, near = (
        float((read(scheme, Jumpy(network("vector"))) - honest).norm())
        for scheme in (plain, replace(plain, bound=2.0))
    )
    assert near < far / 3
    assert torch.equal(read(replace(plain, bound=1e9), Counting(network("vector"))), honest)


def test_an_api_is_asked_as_quietly_as_wanted() -> None:
    """Smaller nudges lie along the same directions, and reading with them comes nearer the gradient."""
    loud = FilterGradient(step=0.5)
    quiet = replace(loud, reading_step=0.005, contrasts_per_carrier=8)
    assert "reading_step" not in loud.parameters() and quiet.parameters()["reading_step"] == 0.005
    mark, pool = quiet.mark(KEY, SPECS["vector"]), inputs("vector", 100, seed=4)
    along, asked = (d.all(pool[0], mark.group(pool[1])) for d in (mark.directions, mark.asked))
    torch.testing.assert_close(along, 100 * asked)

    def read(mark: FilterGradientMark, access: Access) -> torch.Tensor:
        queries = 2 * len(pool[0]) * mark.directions.n
        suspect = white(network("vector"))
        values = quiet.read(mark, suspect, pool, access=access, carriers=100, queries=queries).values
        return values / values.norm()

    exact = read(mark, "white")
    near, far = ((read(m, "black") - exact).norm() for m in (mark, replace(mark, asked=mark.directions)))
    assert near < far / 5
