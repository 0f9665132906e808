"""Every carrier as a full member: by the command line from embed to verify, alone and together; as data."""

from __future__ import annotations

import json
import stat
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import stats

import tiny
from commandline import gradmark, refused
from conformance import KEY, SPECS, network, pool, white
from gradmark import catalog
from gradmark.codec import MarkFile
from gradmark.data import load_data
from gradmark.embed import Marker
from gradmark.errors import MismatchError, UsageError
from gradmark.keys import OwnerKey
from gradmark.stats import fisher, run_test
from gradmark.suspects import open_suspect, save_weights
from gradmark.triggers import triggers_of
from gradmark.verify import verify

NET = ("--model", "tiny:net", "--data", "digits")


@pytest.fixture(scope="module")
def key(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("key") / "acme.key"
    arguments = ("keygen", "--owner", "Acme Ltd", "--out", path, "--no-passphrase", "--seed", 7)
    assert gradmark(*arguments).code == 0
    return path


def embed(key: Path, out: Path, scheme: str, *more: object) -> None:
    # Weights that must look like a control's move slowly: five epochs place three bits in four.
    epochs = 20 if "weights" in scheme else 5
    result = gradmark("embed", *NET, "--key", key, "--out", out, "--scheme", scheme, "--epochs", epochs,
                      "--strength", 1, *more, "--json")  # fmt: skip
    assert result.code in (0, 1), result.err
    assert result.json()["verdict"]["log10_p"] < -4, (scheme, result.json()["verdict"])


def ask(key: Path, out: Path, *more: object) -> dict[str, object]:
    result = gradmark("verify", out / "model.safetensors", "--key", key, "--mark", out / "mark.json", *NET,
                      "--json", *more)  # fmt: skip
    assert result.code in (0, 1, 3), result.err
    return result.json()


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["weights", "trigger", "margin-trigger", "probe-gradient", "gradsigns"])
def test_embed_then_verify(key: Path, tmp_path: Path, scheme: str) -> None:
    more = ("--set", "step=0.2", "--method", "exact") if scheme == "gradsigns" else ()
    embed(key, tmp_path / "out", scheme, "--bits", 32, *more)
    found = ask(key, tmp_path / "out", "--alpha", 1e-4)
    assert (found["outcome"], found["scheme"]) == ("owned", scheme)
    if scheme != "weights":
        black = ask(key, tmp_path / "out", "--alpha", 1e-3, "--access", "black", "--queries", 6000)
        assert black["outcome"] == "owned"
        assert 0 < black["queries"] <= 6000


@pytest.mark.slow
def test_weights_with_class_contrasts_by_the_command_line(key: Path, tmp_path: Path) -> None:
    """Both are put in by one command; the p-value is Fisher's of the two parts' own, and valid."""
    out, other = tmp_path / "out", tmp_path / "other.key"
    embed(key, out, "weights,class-contrast", "--set", 'layers=["3.*"]', "--set", "class-contrast.bits=64")
    mark = json.loads((out / "mark.json").read_text())
    first, second = mark["parameters"]["parts"]
    assert (first["scheme"], first["parameters"]["layers"]) == ("weights", ["3.*"])
    assert (second["scheme"], second["parameters"]["bits"]) == ("class-contrast", 64)
    found = gradmark("verify", out / "model.safetensors", "--key", key, "--mark", out / "mark.json", *NET,
                     "--json", "--report", tmp_path / "report.html")  # fmt: skip
    assert found.json()["outcome"] == "owned"
    suspect = open_suspect(out / "model.safetensors", model="tiny:net")
    data = load_data("digits").test.all()
    verdict = verify(MarkFile.load(out / "mark.json"), OwnerKey.load(key), suspect, data)
    assert verdict.reading is not None
    signed = (verdict.reading.values * verdict.reading.bits).split(list(verdict.reading.parts))
    parts = [run_test("signed-rank", part.numpy()).log10_p for part in signed]
    assert min(parts) < -4
    assert found.json()["log10_p"] == pytest.approx(fisher(parts), abs=1e-6)
    page = (tmp_path / "report.html").read_text()
    assert "Is a secret weighted sum" in page
    assert "which wrong classes score higher" in page
    black = ask(key, out, "--access", "black")  # the weights' part can't be read: the other goes alone
    assert black["ties"] == 64
    assert gradmark("keygen", "--owner", "Else", "--out", other, "--no-passphrase", "--seed", 8).code == 0
    refused(gradmark("verify", out / "model.safetensors", "--key", other, "--mark", out / "mark.json", *NET),
            "doesn't belong")  # fmt: skip


def test_options_of_a_part_are_that_parts() -> None:
    options = {"class-contrast.bits": 40, "bits": 20, "weights.preserve": 0}
    found = catalog.scheme("weights,class-contrast", options)
    assert [part.bits for part in found.parts] == [20, 40]
    assert found.parts[0].preserve == 0
    with pytest.raises(Exception, match="part of the mark"):
        catalog.scheme("weights,class-contrast", {"trigger.bits": 40})


# --- weights that look unmarked ---------------------------------------------------------------------------


def layer(model: torch.nn.Module) -> np.ndarray:
    return model[4].weight.detach().numpy()


@pytest.mark.parametrize("preserve", [0.0, 1.0])
def test_marked_weights_keep_their_distribution(preserve: float) -> None:
    """Kolmogorov-Smirnov distance from an unmarked network's layer: small with the penalty, large without."""
    domain, x, labels = "grey", *pool("grey")
    control = network(domain)
    plain = catalog.scheme("weights", {"preserve": preserve})
    scheme = plain.calibrated(KEY, SPECS[domain], white(control), (x, labels))
    marked = network(domain)
    marker = Marker(scheme, KEY, SPECS[domain], weight=1.0, margin=0.5, every=1)
    optimizer = torch.optim.Adam(marked.parameters(), 3e-3)
    for _ in range(150):
        loss = marker.penalty(marked, (x[:50], labels[:50]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    mark = scheme.mark(KEY, SPECS[domain])
    values = scheme.read(mark, white(marked), (x, labels), access="white", carriers=1)
    assert float((values.values * values.bits > 0).double().mean()) > 0.95
    distance = stats.ks_2samp(layer(marked).ravel(), layer(control).ravel()).statistic
    means = stats.ks_2samp(layer(marked).mean(0), layer(control).mean(0)).statistic
    if preserve:
        assert distance < 0.02
        assert means < 0.1
        assert float(scheme.distortion(mark, control).detach()) < 5e-3
    else:
        assert distance > 0.05
        assert means > 0.2
        assert float(scheme.distortion(mark, control).detach()) == 0.0


def test_the_penalty_is_the_squared_wasserstein_distance_in_variances() -> None:
    control, other = network("grey"), network("grey", seed=5)
    scheme = catalog.scheme("weights").calibrated(KEY, SPECS["grey"], white(control), pool("grey"))
    expected = []
    for seen in (lambda w: w.ravel(), lambda w: w.mean(0)):
        a, b = np.sort(seen(layer(other)).astype(float)), np.sort(seen(layer(control)).astype(float))
        expected.append(((a - b) ** 2).mean() / b.var())
    assert float(scheme.distortion(None, other).detach()) == pytest.approx(np.mean(expected), rel=0.1)
    shaped = catalog.scheme("weights", {"layers": ["*"], "quantiles": scheme.parameters()["quantiles"]})
    with pytest.raises(MismatchError, match="other layers"):
        shaped.distortion(None, other)


def test_the_penalty_changes_neither_bits_nor_projections() -> None:
    a, b = (catalog.scheme("weights", {"preserve": p}).mark(KEY, SPECS["grey"]) for p in (0.0, 1.0))
    assert torch.equal(a.bits, b.bits)
    assert torch.equal(a.projection(64), b.projection(64))


# --- triggers as data -------------------------------------------------------------------------------------


def test_a_training_that_knows_nothing_of_us_takes_the_mark_up(key: Path, tmp_path: Path) -> None:
    out, file = tmp_path / "out", tmp_path / "triggers.npz"
    made = gradmark("embed", "--data", "digits", "--key", key, "--out", out, "--export-triggers", file,
                    "--bits", 40, "--json")  # fmt: skip
    assert made.code == 0, made.err
    assert made.json()["n"] == 40
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    with np.load(file, allow_pickle=False) as arrays:
        x, y = torch.from_numpy(arrays["x"]), torch.from_numpy(arrays["y"])
    assert x.ndim == 4
    natural, labels = load_data("digits").to_train().all()
    natural, labels = torch.cat([natural, x.repeat(4, 1, 1, 1)]), torch.cat([labels, y.repeat(4)])
    torch.manual_seed(0)
    model = tiny.net()
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(8):
        for part in torch.randperm(len(labels)).split(64):
            loss = F.cross_entropy(model(natural[part]), labels[part])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    save_weights(model.eval(), out / "model.safetensors")
    for access in ("white", "black"):
        assert ask(key, out, "--access", access)["outcome"] == "owned"


def test_exported_images_are_the_very_triggers() -> None:
    for domain in ("grey", "colour", "mono", "vector"):
        found = triggers_of(catalog.scheme("trigger"), KEY, SPECS[domain])
        arrays = found.arrays()
        x = torch.from_numpy(arrays["x"])
        if domain in ("grey", "colour"):
            assert x.dtype == torch.uint8
            x = (x[:, None] if domain == "grey" else x.movedim(-1, 1)).float() / 255
        torch.testing.assert_close(x, found.x, rtol=0, atol=1e-7)
        assert torch.equal(torch.from_numpy(arrays["y"]), found.labels)
    with pytest.raises(UsageError, match="Only triggers"):
        triggers_of(catalog.scheme("weights"), KEY, SPECS["grey"])


def test_exports_that_make_no_sense(key: Path, tmp_path: Path) -> None:
    file, out = tmp_path / "t.npz", tmp_path / "out"
    base = ("embed", "--data", "digits", "--key", key, "--out", out)
    refused(gradmark(*base), "--model")
    refused(gradmark(*base, "--export-triggers", file, "--scheme", "weights"), "Only triggers")
    file.touch()
    refused(gradmark(*base, "--export-triggers", file), "exists already")
    assert not out.exists()
