"""Defences of a thief's API: what they do, that batching doesn't matter, and that a reading never fails."""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from conformance import KEY, SPECS, inputs, mark_file, network, pool, same_world, trained, white, world
from gradmark import catalog
from gradmark.attacks.output_match import Matched
from gradmark.coarse import coarse
from gradmark.errors import AttackError
from gradmark.protocols import Thief
from gradmark.verify import verify

INPUT = [name for name in catalog.ATTACKS if name.startswith("input-")]
OUTPUT = [name for name in catalog.ATTACKS if name.startswith("output-")]
GUARDS = [*INPUT, *OUTPUT, "detect-probes"]
SENSELESS = {
    "vector": {"input-smooth", "input-crop", "input-flip", "input-jpeg", "input-squeeze"},
    "mono": {"input-flip", "input-jpeg"},
    "stereo": {"input-flip", "input-jpeg"},
    "grey": set(),
    "colour": set(),
}


class Echo(nn.Module):
    """Shows what the model was given."""

    def forward(self, x: Tensor) -> Tensor:
        return x


def thief(domain: str = "colour", n: int = 60) -> Thief:
    return Thief(
        SPECS[domain],
        *inputs(domain, n, seed=4),
        sibling=network(domain, seed=9),
        fresh=lambda: network(domain),
    )


def guard(name: str, model: nn.Module, given: Thief | None = None, seed: int = 0, **settings: Any) -> Any:
    attack = catalog.attack(name, settings)
    return attack.run(model, given or thief(), torch.Generator().manual_seed(seed))


def seen(name: str, x: Tensor, domain: str = "colour", **settings: Any) -> Tensor:
    """What the model behind the guard gets for x."""
    return guard(name, Echo(), thief(domain), **settings)(x)


@pytest.mark.parametrize("domain", list(SPECS))
@pytest.mark.parametrize("name", GUARDS)
def test_batching_doesnt_matter_and_the_model_stays(name: str, domain: str) -> None:
    model = network(domain).train()
    if name in SENSELESS[domain]:
        with pytest.raises(AttackError, match="makes no sense"):
            guard(name, model, thief(domain))
        return
    before, x = world(model), pool(domain)[0][:30]
    answers = []
    for sizes in ([30], [1] * 30, [7, 23]):
        wrapped = guard(name, model, thief(domain), seed=3)
        assert not any(part.training for part in wrapped.modules())
        with torch.no_grad():
            answers.append(torch.cat([wrapped(part) for part in x.split(sizes)]))
    for again in answers[1:]:
        torch.testing.assert_close(again, answers[0], atol=1e-5, rtol=1e-4)
    assert same_world(before, world(model))
    assert answers[0].shape == (30, 10)
    if name.startswith("output"):
        assert bool(((answers[0] >= 0) & (answers[0] <= 1)).all())


@pytest.mark.parametrize("name", GUARDS)
def test_gradients_get_through(name: str) -> None:
    x = pool("colour")[0][:6].clone().requires_grad_()
    scores = guard(name, trained("filter-gradient", "colour"))(x)
    (gradient,) = torch.autograd.grad((scores * torch.arange(10)).sum(), x)
    assert float(gradient.abs().max()) > 0


@pytest.mark.parametrize("access", ["white", "black"])
@pytest.mark.parametrize(
    ("name", "settings"),
    [
        *[(name, {}) for name in GUARDS],
        *[("output-round", {"decimals": d}) for d in (1, 3)],
        ("output-temperature", {"temperature": 0.01}),
        ("output-noise", {"level": 0.5}),
        ("output-topk", {"k": 1}),
        ("output-noise+output-round", {}),
        ("output-topk+output-temperature", {}),
        ("detect-probes", {"answer": "noise"}),
    ],
)
def test_a_reading_never_fails(name: str, settings: dict[str, Any], access: Any) -> None:
    wrapped = guard(name, trained("filter-gradient", "grey"), thief("grey"), **settings)
    file = mark_file("filter-gradient", "grey", carriers=40)
    verdict = verify(file, KEY, white(wrapped), pool("grey"), access=access, queries=400)
    assert verdict.outcome in ("owned", "no-evidence", "inconclusive")


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("output-round", {"decimals": 2}),
        ("output-topk", {"k": 3}),
        ("output-temperature", {}),
        ("input-noise", {}),
        ("input-jpeg", {}),
    ],
)
def test_a_mark_survives_a_mild_guard(name: str, settings: dict[str, Any]) -> None:
    wrapped = guard(name, trained("filter-gradient", "grey"), thief("grey"), **settings)
    file = mark_file("filter-gradient", "grey")
    assert verify(file, KEY, white(wrapped), pool("grey"), access="black", queries=4000).log10_p < -4


# --- inputs -----------------------------------------------------------------------------------------------


def test_noise_has_its_size() -> None:
    x = torch.full((50, 3, 16, 16), 0.5)
    given = replace(thief(), spec=replace(SPECS["colour"], scale=2.0))
    noise = guard("input-noise", Echo(), given, sigma=0.1)(x) - x
    assert float(noise.std()) == pytest.approx(0.2, rel=0.02)


@pytest.mark.parametrize("kind", ["mean", "gaussian"])
@pytest.mark.parametrize("domain", ["grey", "colour", "mono", "stereo"])
def test_a_blur_keeps_what_is_flat_and_spreads_a_point(kind: str, domain: str) -> None:
    shape = SPECS[domain].input_shape
    flat = torch.full((2, *shape), 0.3)
    torch.testing.assert_close(seen("input-smooth", flat, domain, kind=kind, size=5), flat)
    point = torch.zeros(1, *shape)
    at = tuple(4 for _ in shape[-(2 if SPECS[domain].domain == "image" else 1) :])
    point[(..., *at)] = 1.0
    out = seen("input-smooth", point, domain, kind=kind, size=3)
    assert int((out != 0).sum()) == (3 ** len(at)) * (point != 0).sum()
    assert float(out.sum()) == pytest.approx(float(point.sum()), rel=1e-5)
    torch.testing.assert_close(out, out.flip(-1).roll(-shape[-1] + 9, -1))
    with pytest.raises(AttackError, match="odd"):
        seen("input-smooth", flat, domain, size=4)


@pytest.mark.parametrize("domain", ["grey", "colour"])
def test_jpeg_is_near_and_nearer_at_better_quality(domain: str) -> None:
    x = pool(domain)[0][:10]
    errors = [float((seen("input-jpeg", x, domain, quality=q) - x).abs().mean()) for q in (95, 75, 10)]
    assert 0 < errors[0] < errors[1] < errors[2] < 0.2


def test_jpeg_needs_a_picture_and_pillow(monkeypatch: pytest.MonkeyPatch) -> None:
    two = replace(thief(), spec=replace(SPECS["colour"], input_shape=(2, 16, 16)))
    with pytest.raises(AttackError, match="1 or 3 channels"):
        guard("input-jpeg", Echo(), two)
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(AttackError, match="Pillow"):
        guard("input-jpeg", Echo())


def test_depth_leaves_few_levels() -> None:
    x = pool("colour")[0]
    out = seen("input-depth", x, bits=3)
    assert len(out.unique()) <= 8
    assert float((out - x).abs().max()) <= 0.5001 / 7
    vector = pool("vector")[0]  # without bounds: those of the thief's inputs
    assert len(seen("input-depth", vector, "vector", bits=2).unique()) <= 4


def test_flip_and_chance() -> None:
    x = pool("colour")[0][:40]
    assert torch.equal(seen("input-flip", x), x.flip(-1))
    some = seen("input-flip", x, chance=0.5)
    flipped = (some == x.flip(-1)).flatten(1).all(1)
    assert bool((flipped | (some == x).flatten(1).all(1)).all())
    assert 5 < int(flipped.sum()) < 35


def test_crop_shifts() -> None:
    x = pool("colour")[0][:40]
    fixed = seen("input-crop", x, shift=2, random=False)
    assert torch.equal(fixed[:, :, 2:, 2:], x[:, :, :-2, :-2])
    assert torch.equal(fixed[:, :, 0], fixed[:, :, 2])
    moved = seen("input-crop", x, shift=1)
    assert len({tuple(row.tolist()) for row in (moved - x).flatten(1)[:, :5]}) > 3
    assert torch.equal(seen("input-crop", x, shift=0), x)
    signal = pool("mono")[0]
    assert torch.equal(seen("input-crop", signal, "mono", shift=3, random=False)[:, 3:], signal[:, :-3])


@pytest.mark.parametrize("domain", ["colour", "mono"])
def test_squeezing_takes_the_median(domain: str) -> None:
    x = torch.zeros(1, *SPECS[domain].input_shape)
    x[(..., 5) if domain == "mono" else (..., 5, 5)] = 1.0
    out = seen("input-squeeze", x, domain, size=3, bits=8)
    assert out.shape == x.shape
    assert float(out.abs().max()) < 0.01  # a lone point is gone (signals have no level at zero)


def test_components_reconstruct() -> None:
    """Inputs of three components come back from a thief's who has only those; others lose what's outside."""
    g = torch.Generator().manual_seed(0)
    axes = torch.randn(3, 20, generator=g)
    given = replace(thief("vector"), x=torch.randn(200, 3, generator=g) @ axes + 5)
    wrapped = guard("input-pca", Echo(), given, share=0.9999)
    inside = torch.randn(7, 3, generator=g) @ axes + 5
    torch.testing.assert_close(wrapped(inside), inside, atol=1e-3, rtol=1e-3)
    outside = inside + torch.randn(7, 20, generator=g)
    out = wrapped(outside)
    assert float((out - outside).square().mean()) > 0.5
    assert torch.linalg.matrix_rank(out - given.x.mean(0), rtol=1e-4) == 3
    assert (
        torch.linalg.matrix_rank(guard("input-pca", Echo(), given, share=0.3)(outside) - given.x.mean(0)) < 3
    )


# --- outputs ----------------------------------------------------------------------------------------------

LOGITS = 4 * torch.randn(50, 10, generator=torch.Generator().manual_seed(8))


@pytest.mark.parametrize("x", [LOGITS, LOGITS.softmax(1)], ids=["logits", "probabilities"])
def test_outputs_say_what_they_should(x: Tensor) -> None:
    p = LOGITS.softmax(1)
    torch.testing.assert_close(seen("output-round", x, decimals=1), p.double().round(decimals=1).float())
    torch.testing.assert_close(seen("output-temperature", x, temperature=3.0), (LOGITS / 3).softmax(1))
    assert torch.equal(seen("output-top1", x), torch.eye(10)[p.argmax(1)])
    top = seen("output-topk", x, k=3)
    assert bool(((top > 0).sum(1) == 3).all())
    torch.testing.assert_close(top.sort(1, descending=True).values[:, :3], p.topk(3, 1).values)
    noisy = seen("output-noise", x, level=0.05)
    torch.testing.assert_close(noisy.sum(1), torch.ones(50))
    assert 0.01 < float((noisy - p).std()) < 0.06


# --- probes -----------------------------------------------------------------------------------------------


def probes(sizes: list[int], memory: int = 100, answer: str = "repeat") -> tuple[Tensor, Tensor]:
    """Answers to x + d and x - d, asked one pair after the other in chunks."""
    x = pool("colour")[0][:20]
    d = 0.005 * torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    asked = torch.stack([x + d, x - d], 1).flatten(0, 1)
    wrapped = guard("detect-probes", network("colour"), thief(n=200), memory=memory, answer=answer)
    with torch.no_grad():
        answers = torch.cat([wrapped(part) for part in asked.split(sizes)])
    return answers[::2], answers[1::2]


@pytest.mark.parametrize("sizes", [[40], [1] * 40, [3] * 13 + [1]])
@pytest.mark.parametrize("memory", [1, 5, 100])
def test_pairs_get_one_answer(sizes: list[int], memory: int) -> None:
    plus, minus = probes(sizes, memory)
    assert torch.equal(plus, minus)
    torch.testing.assert_close(plus, probes([40])[0])  # batches round differently
    assert len(plus.unique(dim=0)) == 20


def test_noise_keeps_the_class_and_nothing_else() -> None:
    plus, minus = probes([40], answer="noise")
    assert torch.equal(plus.argmax(1), minus.argmax(1))
    assert torch.equal(plus.sort(1).values, minus.sort(1).values)
    assert not bool((plus == minus).all(1).any())


def test_natural_inputs_get_their_own_answers() -> None:
    model, x = network("colour"), pool("colour")[0]
    with torch.no_grad():
        off = (guard("detect-probes", model, thief(n=200))(x) - model(x)).abs().amax(1) > 1e-4
    assert float(off.double().mean()) <= 0.02


def test_what_is_forgotten_is_answered_anew() -> None:
    wrapped, x = guard("detect-probes", network("colour"), thief(n=200), memory=2), pool("colour")[0][:4]
    with torch.no_grad():
        first = wrapped(x)  # remembers the last two
        again = wrapped(x[2:] + 1e-4)
        anew = wrapped(x[:1] + 1e-4)
    assert torch.equal(first[2:], again)
    assert not torch.equal(first[:1], anew)


def test_a_thief_with_one_input_knows_no_distance() -> None:
    same = replace(thief(), x=torch.zeros(10, 3, 16, 16))
    with pytest.raises(AttackError, match="all the same"):
        guard("detect-probes", Echo(), same)


# --- wrong classes made ordinary --------------------------------------------------------------------------


def wrong(model: nn.Module, x: Tensor, best: Tensor) -> Tensor:
    """Mean log-scores (C, C) of the wrong classes by best class (b,), each row centred."""
    z = model(x).clamp_min(1e-30).log() if isinstance(model, Matched) else model(x)
    rows = []
    for c in range(z.shape[1]):
        row = z[best == c].mean(0) if bool((best == c).any()) else torch.zeros(z.shape[1])
        others = torch.arange(z.shape[1]) != c
        rows.append(torch.where(others, row - row[others].mean(), 0.0))
    return torch.stack(rows)


@pytest.mark.parametrize("kind", ["means", "linear", "kernel", "whole"])
def test_matching_keeps_the_best_class_and_makes_the_others_ordinary(kind: str) -> None:
    model, own = trained("filter-gradient", "grey"), trained("filter-gradient", "grey", marked=False)
    x = pool("grey")[0]
    matched = guard("output-match", model, Thief(SPECS["grey"], *pool("grey"), sibling=own), kind=kind)
    with torch.no_grad():
        best = model(x).argmax(1)
        assert torch.equal(matched(x).argmax(1), best)
        with torch.autocast("cpu", torch.bfloat16):  # as a thief's student asks
            assert float((matched(x).argmax(1) == best).float().mean()) > 0.95
        before, after = wrong(model, x, best), wrong(matched, x, best)
        target = wrong(own, x, best)
    both = (before.norm(dim=1) > 0) & (target.norm(dim=1) > 0)
    assert int(both.sum()) > 5
    now, then = (torch.cosine_similarity(v, target)[both] for v in (after, before))
    assert float(now.min()) > 0.9 > float(then.min())


@pytest.mark.parametrize(
    ("domain", "number", "view"), [("grey", 1, "cells"), ("grey", 1, "overall"), ("mono", 0, "overall")]
)
def test_who_matches_linearly_looks_as_the_mark_file_says(domain: str, number: int, view: str) -> None:
    """What grows with an image's fineness, or a signal's loudness, is taken out where a mark may be."""
    spec, (x, labels) = SPECS[domain], pool(domain)
    plain = trained("filter-gradient", domain, marked=False)
    pull = torch.tensor([3.0, -3.0] * 5)

    def seen(x: Tensor) -> Tensor:
        return coarse(spec, x, "overall")[:, number : number + 1] / spread

    spread = coarse(spec, x, "overall")[:, number].std()
    middle = seen(x).mean(0)

    class Pulled(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return plain(x) + pull * (seen(x) - middle)

    given = Thief(spec, x, labels, sibling=plain, directions={"view": view})
    matched = guard("output-match", Pulled(), given, kind="linear")
    with torch.no_grad():
        best = Pulled()(x).argmax(1)
        kept = []
        for m in (Pulled(), matched):
            z = m(x).clamp_min(1e-30).log() if isinstance(m, Matched) else m(x)
            kept.append(_covariance(z, seen(x)[:, 0], best, pull))
    assert kept[1] < 0.4 * kept[0] if view == "overall" else kept[1] > 0.5 * kept[0]


def _covariance(z: Tensor, feature: Tensor, best: Tensor, pull: Tensor) -> float:
    """How the wrong classes' scores follow the feature along ``pull``, within predicted classes."""
    total = 0.0
    for c in best.unique().tolist():
        mine, others = best == c, torch.arange(10) != c
        along = z[mine][:, others] @ (pull[others] - pull[others].mean())
        total += float(((feature[mine] - feature[mine].mean()) * (along - along.mean())).sum())
    return total


def test_a_network_of_his_own_is_trained_or_refused() -> None:
    with pytest.raises(AttackError, match="no network of its own"):
        guard("output-match", network("grey"), Thief(SPECS["grey"], *inputs("grey", 20, seed=0)))
    given = Thief(SPECS["grey"], *pool("grey"), fresh=lambda: network("grey", 5), lr=0.05)
    own = guard("output-match", network("grey"), given, own="fresh", epochs=20).own
    right = [float((m(given.x).argmax(1) == given.labels).float().mean()) for m in (network("grey", 5), own)]
    assert right[1] > right[0] + 0.1
