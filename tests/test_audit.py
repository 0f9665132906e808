"""The audit: crude marks are found, twins pass, and every number agrees with a slow oracle."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from commandline import gradmark, refused
from conformance import SPECS, inputs, network, same_world, scheme_for, white, world
from gradmark.audit import Audit, auc_interval, audit, audit_report
from gradmark.audit.effects import BINS, Effect, ece, side_effects
from gradmark.audit.gradients import without_secrets
from gradmark.audit.measure import discriminant, resampling
from gradmark.audit.page import remedies
from gradmark.audit.population import cross_validated, features, judge_population
from gradmark.audit.queries import Recorder, compare_queries, one_each, probes
from gradmark.audit.robust import SEVERITIES, corrupted, corruptions, pgd
from gradmark.audit.weights import compare_weights
from gradmark.errors import DataError, MismatchError, UsageError
from gradmark.keys import OwnerKey
from gradmark.protocols import Batch, ModelSpec, Reading
from gradmark.report import render_html
from gradmark.suspects import save_weights

SCHEME = scheme_for("filter-gradient", "grey")
SPEC = SPECS["grey"]


@cache
def twin(seed: int) -> nn.Sequential:
    model, (x, labels) = network("grey", seed), inputs("grey", 800, seed=0)
    optimizer = torch.optim.Adam(model.parameters(), 5e-3)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(5):
        for part in torch.randperm(len(x), generator=generator).split(50):
            optimizer.zero_grad()
            F.cross_entropy(model(x[part]), labels[part]).backward()
            optimizer.step()
    return model.eval()


class Crude(nn.Module):
    """A network whose scores all lean along one kernel's direction, wherever that is in the picture."""

    def __init__(self, inner: nn.Module, strength: float) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.inner = inner
        self.kernel = nn.Parameter(torch.randn(1, 1, 5, 5, generator=generator), requires_grad=False)
        self.lean = nn.Parameter(strength * torch.randn(10, generator=generator), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        energy = F.conv2d(x - 0.5, self.kernel, padding=2).square().mean((1, 2, 3))
        return self.inner(x) + energy[:, None] * self.lean


class Sender:
    """A scheme that sends what it is told to."""

    name = "sender"

    def __init__(self, change: Any) -> None:
        self.change = change

    def parameters(self) -> dict[str, Any]:
        return {}

    def mark(self, key: Any, spec: ModelSpec) -> Any:
        return torch.Generator().manual_seed(int(key.key_id[-6:], 16))

    def read(self, mark: Any, suspect: Any, pool: Batch, **_: Any) -> Reading:
        suspect.query(self.change(pool[0], mark))
        return Reading(torch.ones(8), torch.ones(8), len(pool[0]), len(pool[0]), "black")


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@cache
def of_twins() -> Audit:
    return audit(white(twin(1)), white(twin(2)), inputs("grey", 300, 9), SPEC, SCHEME, queries=400)


# -- numbers


@pytest.mark.parametrize("levels", [3, 1000])
def test_auc_is_the_share_of_pairs_in_order(levels: int) -> None:
    from sklearn.metrics import roc_auc_score

    rng = np.random.default_rng(levels)
    x, y = rng.integers(levels, size=40) + levels // 3, rng.integers(levels, size=70)
    found = auc_interval(x, y)
    pairs = np.mean((x[:, None] > y).astype(float) + (x[:, None] == y) / 2)
    assert found.value == pytest.approx(pairs)
    truth = np.repeat([1, 0], [40, 70])
    assert found.value == pytest.approx(roc_auc_score(truth, np.concatenate([x, y])))
    assert 0 <= found.low < found.value < found.high <= 1


def test_auc_interval_covers() -> None:
    rng = np.random.default_rng(0)
    true = 0.7602  # of N(1, 1) against N(0, 1)
    found = [auc_interval(rng.normal(1, 1, 40), rng.normal(0, 1, 40)) for _ in range(400)]
    assert 0.90 <= np.mean([f.low <= true <= f.high for f in found]) <= 0.98


def test_auc_at_the_end_is_not_certain() -> None:
    found = auc_interval(np.arange(10) + 20, np.arange(15))
    assert (found.value, found.high) == (1.0, 1.0)
    assert found.low == pytest.approx(0.7)
    with pytest.raises(UsageError):
        auc_interval([1.0], [0.0, 2.0])


def test_resampling_keeps_the_sample_first() -> None:
    weights = resampling(30, generator(), 50)
    assert torch.equal(weights[0], torch.full((30,), 1 / 30))
    assert torch.allclose(weights.sum(1), torch.ones(51))
    assert weights[1:].std() > 0


def test_ece_against_a_loop() -> None:
    confidence = torch.rand(200, generator=generator())
    right = (torch.rand(200, generator=generator(1)) < confidence**2).float()
    total = 0.0
    for b in range(BINS):
        held = [i for i in range(200) if b / BINS <= confidence[i] < (b + 1) / BINS]
        if held:
            total += len(held) / 200 * abs(sum(float(right[i] - confidence[i]) for i in held) / len(held))
    assert float(ece(confidence, right, torch.full((1, 200), 1 / 200))) == pytest.approx(total, abs=1e-5)


# -- with the weights


def striking(found: Audit, part: str) -> set[str]:
    return {d.name for d in found.detectors if d.striking and d.part == part}


def test_twins_pass() -> None:
    found = of_twins()
    assert len([d for d in found.detectors if d.access == "white"]) > 20
    assert not striking(found, "gradients")
    assert not striking(found, "weights")


def test_one_coherent_direction_is_found() -> None:
    marked = white(Crude(twin(1), 20.0))
    found = audit(marked, white(twin(2)), inputs("grey", 300, 9), SPEC, SCHEME, queries=400)
    names = striking(found, "gradients")
    assert {"largest singular value", "common share", "readings under strange keys"} <= names


def test_a_spike_in_the_weights_is_found() -> None:
    import copy

    spiked = copy.deepcopy(twin(1))
    last = spiked[-3]
    assert isinstance(last, nn.Linear)
    with torch.no_grad():
        u, v = (
            torch.randn(64, 1, generator=generator()),
            torch.randn(1, last.in_features, generator=generator()),
        )
        last.weight += 0.1 * u @ v
    names = {d.name for d in compare_weights(spiked, twin(2), generator())[0] if d.striking}
    assert "4.weight: largest singular value" in names
    assert all(name.startswith("4.") for name in names)


def test_an_owners_sealed_numbers_are_left_out() -> None:
    """A mark's file may hold what only its key opens: strangers' keys must do without."""
    plain: Any = SCHEME
    sealed = plain.calibrated(OwnerKey.from_seed(5), SPEC, white(twin(1)), inputs("grey", 60, 4))
    assert sealed != plain
    assert without_secrets(sealed) == plain
    found = features(twin(1), sealed, SPEC, inputs("grey", 60, 9), twin(2))
    assert all(np.isfinite(value) for value in found.values())
    assert found["gradients: share beyond it"] < 0
    itself = features(twin(1), sealed, SPEC, inputs("grey", 60, 9), twin(1))
    assert itself["gradients: share beyond it"] < -10, "nothing is left beyond the network itself"


# -- from queries


def looks(change: Any) -> dict[str, bool]:
    data = inputs("grey", 800, 9)
    found, _ = compare_queries(Sender(change), SPEC, white(twin(1)), data, 200, generator())
    return {d.name: d.striking for d in found}


def test_natural_probes_pass() -> None:
    found = looks(lambda x, g: x[torch.randperm(len(x), generator=g)])
    found.pop("distance to known inputs, carriers among them")  # the carriers themselves, of course
    assert not any(found.values())


@pytest.mark.parametrize(
    ("change", "names"),
    [
        (
            lambda x, g: torch.rand(x.shape, generator=g),
            {"distance to known inputs", "looks of single inputs"},
        ),
        (lambda x, g: x.repeat(2, 1, 1, 1), {"share of exact duplicates", "distance to earlier queries"}),
    ],
    ids=["noise", "twice"],
)
def test_crude_probes_are_noticed(change: Any, names: set[str]) -> None:
    found = looks(change)
    assert names <= {name for name, flag in found.items() if flag}


def test_the_recorder_keeps_what_was_asked() -> None:
    pool = inputs("grey", 60, 4)
    recorder = Recorder(white(twin(1)))
    scores = recorder.query(pool[0])
    assert torch.equal(recorder.probes[0], pool[0])
    assert torch.equal(recorder.probes[1], scores.argmax(1))
    asked, _ = probes(SCHEME, SPEC, white(twin(1)), pool, 240)
    assert len(asked) == 240
    assert len(one_each(asked, pool[0])) <= 60


# -- side effects


def test_pgd_on_a_linear_model_is_exact() -> None:
    """x . w > 0 survives a box of radius r exactly if x . w > r |w|_1; a random start can't change it."""
    spec = ModelSpec("vector", (20,), 2)
    model = nn.Linear(20, 2, bias=False)
    x = torch.randn(200, 20, generator=generator())
    labels = model(x).argmax(1)
    w = (model.weight[0] - model.weight[1]).detach()
    expected = (x @ w).abs() > 0.1 * w.abs().sum()
    assert torch.equal(pgd(white(model), (x, labels), spec, 0.1, generator()), expected)
    assert 0 < expected.float().mean() < 1


@pytest.mark.parametrize("domain", list(SPECS))
def test_corruptions_are_legal_and_grow(domain: str) -> None:
    spec, (x, _) = SPECS[domain], inputs(domain, 40, 3)
    found = corruptions(spec, x)
    assert len(found) >= 2
    for name, corruption in found.items():
        spoilt = [corrupted(spec, x, corruption, s, generator()) for s in SEVERITIES]
        assert all(torch.equal(v, spec.snap(v)) and v.shape == x.shape for v in spoilt), name
        sizes = [float((v - x).square().mean()) for v in spoilt]
        assert 0 < sizes[0] < sizes[2], name


def test_harm_is_told_from_none() -> None:
    data = inputs("grey", 300, 9)
    same, _ = side_effects(white(twin(1)), white(twin(1)), data, SPEC, generator())
    assert all(e.difference == 0 and e.low == 0 and not e.worse for e in same)
    torn = nn.Sequential(nn.Dropout(0.0), *network("grey", 7)).eval()
    found, _ = side_effects(white(torn), white(twin(1)), data, SPEC, generator())
    worse = {e.name for e in found if e.worse}
    assert {"accuracy", "noise 1", "negative log-likelihood"} <= worse
    assert {"accuracy", "class", "attack", "corruption", "calibration"} == {e.kind for e in found}


def test_what_helps_against_harm_is_named() -> None:
    def harm(name: str, worse: bool = True) -> Effect:
        return Effect(name, "corruption", 0.5, 0.9, -0.4, -0.5, -0.3, worse, 100)

    assert remedies([]) == ()
    assert remedies([harm("noise 2"), harm("class 3"), harm("gain 1")]) == ()
    (words,) = remedies([harm("blur 3"), harm("contrast 1")])
    assert "--soften 0.3" in words
    words, more = remedies([harm("calibration error (ECE)"), harm("pixelate 1")])
    assert "--soften 0.3" in words
    assert "--calibrate" in more


# -- populations


def test_a_population_tells_and_does_not_cheat() -> None:
    rng = np.random.default_rng(0)
    truth = np.arange(60) % 2 == 0
    table = rng.normal(size=(60, 40))
    blind = cross_validated(table, truth, rng)
    assert auc_interval(blind[truth], blind[~truth]).low < 0.5
    train = discriminant(table, truth, table)
    assert auc_interval(train[truth], train[~truth]).low > 0.85, "in sample anything can be told: the trap"
    table[:, 5] += 3 * truth
    rows = [{f"weights: {i}": float(v) for i, v in enumerate(row)} for row in table]
    found = judge_population(rows, truth.tolist(), rng)
    by_name = {row["name"]: row for row in found}
    assert by_name["classifier on weights"]["low"] > 0.7
    assert by_name["best feature on everything"]["low"] > 0.9
    single = next(row for row in found if row["how"] == "single feature")
    assert single["name"] == "weights: 5"


# -- as a whole


def test_nothing_is_disturbed_and_all_repeats() -> None:
    model, control, data = twin(1), twin(2), inputs("grey", 60, 9)
    before = world(model), world(control)
    rows = [audit(white(model), white(control), data, SPEC, SCHEME, queries=200).to_json() for _ in range(2)]
    assert rows[0] == rows[1]
    assert all(same_world(a, b) for a, b in zip(before, (world(model), world(control)), strict=True))


def test_misfits_are_refused() -> None:
    few = inputs("grey", 20, 9)
    with pytest.raises(DataError, match="too few"):
        audit(white(twin(1)), white(twin(2)), few, SPEC, SCHEME)
    other = white(nn.Sequential(nn.Flatten(), nn.Linear(64, 12)))
    with pytest.raises(MismatchError, match="fit each other"):
        audit(white(twin(1)), other, inputs("grey", 60, 9), SPEC, SCHEME)


def test_the_report_says_what_was_found() -> None:
    text = render_html(audit_report(of_twins(), "gradmark audit"))
    assert text.count("<img") >= 6
    assert "PGD, radius 0.03" in text
    assert "stands out" in text


@pytest.mark.parametrize("domain", ["vector", "mono", "stereo", "colour"])
def test_every_domain(domain: str) -> None:
    a, b = (white(network(domain, s)) for s in (1, 2))
    found = audit(
        a, b, inputs(domain, 60, 9), SPECS[domain], scheme_for("filter-gradient", domain), queries=200
    )
    assert {d.part for d in found.detectors} == {"weights", "gradients", "queries"}
    render_html(audit_report(found))


def test_command_line(tmp_path: Path) -> None:
    torch.manual_seed(0)
    names = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    for name in names:
        import tiny

        save_weights(tiny.net(), name)
    report = tmp_path / "audit.html"
    common = ("--control", names[1], "--model", "tiny:net", "--data", "digits", "--queries", 200)
    result = gradmark("audit", names[0], *common, "--json", "--report", report)
    assert result.code == 0, result.err
    found = result.json()
    assert found["model"]["name"] == "a.safetensors"
    assert found["control"]["name"] == "b.safetensors"
    assert {"name", "access", "statistic", "auc", "low", "high"} <= set(found["detectors"][0])
    assert any(e["name"] == "accuracy" for e in found["side_effects"])
    assert report.read_text().startswith("<!")
    assert "Side effect" in gradmark("audit", names[0], *common).out
    refused(gradmark("audit", names[0], *common, "--report", tmp_path / "audit.txt"), "*.html or *.pdf")
    refused(gradmark("audit", tmp_path / "none.safetensors", *common), "no file")
