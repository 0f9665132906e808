"""Seals: what stays equal is found intact, what changed is found, and hostile files are refused."""

from __future__ import annotations

import base64
import contextlib
import copy
import json
import math
import random
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from commandline import gradmark, refused
from golden.make import net
from gradmark import OwnerKey
from gradmark.attacks.output_topk import OutputTopK
from gradmark.errors import GradmarkError, MismatchError, ModelError, SealFileError
from gradmark.files import canonical_json
from gradmark.protocols import ModelSpec
from gradmark.report import check_report, render_html
from gradmark.seal import SealFile, check, make_seal
from gradmark.seal.answers import compared
from gradmark.seal.codec import signing_key
from gradmark.seal.manifest import compare, plain_tensors, record
from gradmark.suspects import CallableSuspect, ModuleSuspect, load_weights, save_weights

GOLDEN = Path(__file__).parent / "golden"
KEY = OwnerKey.load(GOLDEN / "key-v1.json")
GRID = ModelSpec("image", (1, 8, 8), 10, 0.0, 1.0, 16)


@cache
def golden_seal() -> SealFile:
    return SealFile.load(GOLDEN / "seal-v1.json")


def golden_net() -> nn.Module:
    model = net().eval()
    load_weights(model, GOLDEN / "golden-v1.safetensors")
    return model


def shown(model: nn.Module, how: str) -> CallableSuspect:
    """The model behind an interface that shows its scores in one way."""

    def ask(x: Tensor) -> Tensor:
        z = model(x)
        if how == "labels":
            return nn.functional.one_hot(z.argmax(1), z.shape[1]).float()
        if how == "log-probabilities":
            return z.log_softmax(1)
        p = z.double().softmax(1)
        if how == "probabilities":
            return p
        if how == "cut":
            return (p * 1e4).floor() / 1e4
        return (p * 10 ** int(how)).round() / 10 ** int(how)

    return CallableSuspect(ask, name=how)


WAYS = ["probabilities", "log-probabilities", "6", "4", "3", "2", "1", "cut", "labels"]


@pytest.mark.parametrize("how", WAYS)
def test_the_golden_model_is_intact_however_it_answers(how: str) -> None:
    found = check(golden_seal(), shown(golden_net(), how))
    assert (found.outcome, found.modified, found.off, found.queries) == ("intact", False, 0, 10)


def test_the_golden_model_is_intact_white_box() -> None:
    model = golden_net()
    found = check(golden_seal(), ModuleSuspect(model), tensors=model.state_dict())
    assert (found.outcome, found.modified, found.tensors) == ("intact", False, ())


@pytest.mark.parametrize("how", [*WAYS[:5], "labels"])
def test_a_small_change_shows(how: str) -> None:
    model = golden_net()
    with torch.no_grad():
        w = model[3].weight
        w.add_(torch.randn(w.shape, generator=torch.Generator().manual_seed(0)) * 0.05 * w.std())
    found = check(golden_seal(), shown(model, how))
    assert (found.outcome, found.modified) == ("modified", True)
    if found.strength is not None:  # 5 % on one of three layers is less than 5 % on all
        assert 0.005 < found.strength < 0.1


def test_strength_is_the_noise_that_was_added() -> None:
    for level in (0.003, 0.03):
        model, g = golden_net(), torch.Generator().manual_seed(3)
        with torch.no_grad():
            for w in (p for p in model.parameters() if p.ndim > 1):
                e = torch.randn(w.shape, generator=g)
                w.add_(e * (level * w.norm() / e.norm()))
        found = check(golden_seal(), ModuleSuspect(model))
        assert found.strength == pytest.approx(level, rel=0.6)


def test_another_network_is_told_apart() -> None:
    torch.manual_seed(7)
    found = check(golden_seal(), ModuleSuspect(net().eval()))
    assert (found.outcome, found.modified) == ("other", True)
    fewer = nn.Sequential(nn.Flatten(), nn.Linear(64, 5))
    assert check(golden_seal(), ModuleSuspect(fewer)).outcome == "other"


def test_equal_weights_in_another_program_are_not_intact() -> None:
    class Backdoored(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x) * 1.01

    model = golden_net()
    found = check(golden_seal(), ModuleSuspect(Backdoored(model)), tensors=model.state_dict())
    assert found.outcome == "modified"
    assert "computes something else" in found.reason


def test_an_interface_that_answers_by_chance_decides_nothing() -> None:
    model, g = golden_net(), torch.Generator().manual_seed(0)
    noisy = CallableSuspect(lambda x: model(x) + 0.01 * torch.randn(len(x), 10, generator=g), name="noisy")
    assert check(golden_seal(), noisy).outcome == "inconclusive"


def test_only_the_largest_classes_shown() -> None:
    model = golden_net()
    few = OutputTopK(2).run(model, None, torch.Generator())  # type: ignore[arg-type]
    assert check(golden_seal(), ModuleSuspect(few)).outcome == "intact"
    with torch.no_grad():
        model[0].weight.mul_(1.02)
    few = OutputTopK(2).run(model, None, torch.Generator())  # type: ignore[arg-type]
    assert check(golden_seal(), ModuleSuspect(few)).modified is True


@pytest.mark.parametrize(
    "spec",
    [
        ModelSpec("vector", (12,), 3),
        ModelSpec("signal", (1, 40), 2, -1.0, 32767 / 32768, 65535),
        ModelSpec("image", (3, 8, 8), 4, 0.0, 1.0, 255),
    ],
    ids=["vector", "signal", "image"],
)
def test_every_kind_of_input(spec: ModelSpec) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Flatten(), nn.Linear(int(np.prod(spec.input_shape)), 32), nn.Tanh(), nn.Linear(32, spec.n_classes)
    ).eval()
    before = copy.deepcopy(model.state_dict())
    seal = make_seal(model, KEY, spec, model="sha256:" + "0" * 64, probes=4, candidates=8)
    assert all(torch.equal(v, before[n]) for n, v in model.state_dict().items())
    assert seal.probes is not None
    z = seal.probes.scores.topk(2, 1).values
    assert float((z[:, 0] - z[:, 1]).min()) >= 4 * seal.probes.tolerance * 0.9  # no label hangs on rounding
    again = SealFile.from_bytes(seal.to_bytes())
    assert torch.equal(again.probes.x, spec.snap(seal.probes.x))  # type: ignore[union-attr]
    assert check(again, ModuleSuspect(model)).outcome == "intact"
    with torch.no_grad():
        model[1].weight.mul_(1.01)
    assert check(again, ModuleSuspect(model)).modified is True


def test_a_model_that_answers_with_probabilities() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10), nn.Softmax(1)).eval()
    seal = make_seal(model, KEY, GRID, model="sha256:" + "0" * 64, probes=4, candidates=8)
    assert check(seal, ModuleSuspect(model)).outcome == "intact"
    assert check(seal, shown(nn.Sequential(model[0], model[1]), "4")).outcome == "intact"


@pytest.mark.statistics
@given(st.integers(0, 2**31), st.sampled_from(WAYS), st.floats(-0.5, 0.5))
def test_arithmetic_within_half_the_tolerance_is_never_an_alarm(seed: int, how: str, size: float) -> None:
    p = golden_seal().probes
    assert p is not None
    g = torch.Generator().manual_seed(seed)
    z = p.scores + size * p.tolerance * (2 * torch.rand(p.scores.shape, generator=g).double() - 1)
    answers = shown(nn.Identity(), how).query(z)
    assert not bool(compared(p.scores, p.form, answers, p.tolerance).off.any())


# ---------------------------------------------------------------- manifest


@given(st.integers(1, 6000), st.integers(1, 40), st.integers(0, 2**31))
def test_estimates_of_a_change(n: int, k: int, seed: int) -> None:
    """Against the plain computation: count, size and largest change where few entries moved."""
    g = torch.Generator().manual_seed(seed)
    value = torch.randn(n, generator=g)
    k = min(k, n)
    moved = value.clone()
    moved[torch.randperm(n, generator=g)[:k]] += 1 + torch.rand(k, generator=g)
    sealed = {"w": record("w", value, seed)}
    (found,) = compare(sealed, {"w": moved}, seed)
    true = float((moved - value).norm() / value.norm())
    assert found.relative_l2 == pytest.approx(true, rel=0.45)
    assert found.changed is not None and abs(found.changed - k) <= max(2, 0.5 * k)
    if k == 1:
        assert found.max_abs == pytest.approx(float((moved - value).abs().max()), rel=1e-5)
    assert compare(sealed, {"w": value.clone()}, seed) == []


def test_what_a_manifest_lists() -> None:
    sealed = {n: record(n, torch.arange(4.0) + i, 1) for i, n in enumerate("abcd")}
    suspect = {
        "a": torch.arange(4.0),
        "b": (torch.arange(4.0) + 1).half(),
        "c": torch.zeros(2, 2),
        "e": torch.ones(3),
    }
    kinds = {c.name: c.kind for c in compare(sealed, suspect, 1)}
    assert kinds == {"b": "dtype", "c": "shape", "d": "missing", "e": "extra"}
    (half,) = [c for c in compare(sealed, suspect, 1) if c.name == "b"]
    assert (half.changed, half.relative_l2) == (0, 0.0)  # small integers are the same in half precision


def test_what_stays_equal() -> None:
    """Batch norm's counters, wrappers' prefixes, tied names, memory order."""
    model = golden_net()
    tensors = model.state_dict()
    sealed = {n: record(n, v, 1) for n, v in plain_tensors(tensors).items()}
    assert not any("num_batches_tracked" in n for n in sealed)
    wrapped = {f"module.{n}": v for n, v in tensors.items()}
    assert compare(sealed, plain_tensors(wrapped), 1) == []
    turned = {
        n: v.contiguous(memory_format=torch.channels_last) if v.ndim == 4 else v for n, v in tensors.items()
    }
    assert compare(sealed, plain_tensors(turned), 1) == []
    w = torch.randn(3, 3)
    assert compare({n: record(n, w, 1) for n in "ab"}, {"a": w}, 1) == []


# ---------------------------------------------------------------- files


def test_the_golden_seal_reads_back_and_fits_its_key() -> None:
    seal = golden_seal()
    assert seal.to_bytes() == (GOLDEN / "seal-v1.json").read_bytes()
    seal.check_key(KEY)
    with pytest.raises(MismatchError, match="didn't make this seal"):
        seal.check_key(OwnerKey(bytes(32), "Acme Ltd"))


def test_a_seal_holds_no_secret() -> None:
    text = (GOLDEN / "seal-v1.json").read_text()
    raw = json.loads((GOLDEN / "key-v1.json").read_text())["secret"]
    assert raw not in text
    assert signing_key(KEY).private_bytes_raw().hex() not in text


def mutated(data: bytes, r: random.Random) -> bytes:
    """One seal file, damaged or forged in one of many ways; forged ones are signed again by a stranger."""
    if r.random() < 0.5:
        raw = bytearray(data)
        for _ in range(r.choice([1, 1, 2, 8])):
            i = r.randrange(len(raw))
            raw[i] = r.randrange(256)
        cut = r.randrange(len(raw)) if r.random() < 0.3 else len(raw)
        return bytes(raw[:cut])
    body = json.loads(data)
    node, name = body, r.choice(list(body))
    while isinstance(node[name], dict | list) and node[name] and r.random() < 0.8:
        node = node[name]
        name = r.choice(list(node)) if isinstance(node, dict) else r.randrange(len(node))
    odd: list[Any] = [
        None,
        -1,
        0,
        1e300,
        "",
        "AAAA",
        [],
        {},
        [[]],
        True,
        "x" * 2000,
        2**70,
        -0.0,
        "sha256:" + "0" * 64,
    ]
    node[name] = r.choice([*odd, node[name]])
    if r.random() < 0.2 and isinstance(node, dict):
        node.pop(name)
    stranger = OwnerKey(bytes(32), "A stranger")
    body.pop("signature", None)
    body["signer"] = "ed25519:" + signing_key(stranger).public_key().public_bytes_raw().hex()
    try:
        content = canonical_json(body)
    except GradmarkError:
        return json.dumps(body).encode()
    message = b"gradmark/v1/seal" + len(content).to_bytes(4, "big") + content
    body["signature"] = base64.b64encode(signing_key(stranger).sign(message)).decode()
    return canonical_json(body)


@given(st.integers(0, 2**63))
def test_hostile_files_give_typed_errors(seed: int) -> None:
    """A short run of what benchmarks/fuzz.py does at length."""
    data = mutated((GOLDEN / "seal-v1.json").read_bytes(), random.Random(seed))
    try:
        seal = SealFile.from_bytes(data)
    except SealFileError:
        return
    with contextlib.suppress(GradmarkError):  # what reads well can be checked with, or is refused as well
        check(seal, ModuleSuspect(golden_net()))


def test_a_changed_file_is_refused() -> None:
    text = (GOLDEN / "seal-v1.json").read_text()
    for old, new, words in [
        ('"created":"2026', '"created":"2027', "changed or damaged"),
        ("gradmark-seal/1", "gradmark-seal/2", "format is unknown"),
        ('"owner":', '"owners":', "other fields"),
    ]:
        with pytest.raises(SealFileError, match=words):
            SealFile.from_bytes(text.replace(old, new, 1).encode())


def test_models_that_cannot_be_sealed() -> None:
    spec = ModelSpec("vector", (4,), 3)
    with pytest.raises(ModelError, match="no weights"):
        make_seal(nn.Identity(), KEY, spec, model="")
    with pytest.raises(ModelError, match="doesn't fit"):
        make_seal(nn.Linear(4, 2), KEY, spec, model="")


# ---------------------------------------------------------------- command line


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A key, a model and its two seals, with and without probes."""
    path = tmp_path_factory.mktemp("sealed")
    KEY.save(path / "acme.key", None)
    save_weights(golden_net(), path / "model.safetensors")
    names = ["--model", "golden.make:net", "--key", path / "acme.key", "--shape", "1,8,8", "--json"]
    made = gradmark("seal", path / "model.safetensors", *names, "--out", path / "m.seal")
    assert made.code == 0, made.err
    assert made.json()["probes"] == 10
    assert made.json()["limits"]["4 decimals"] < 0.02
    made = gradmark(
        "seal", path / "model.safetensors", *names, "--out", path / "public.seal", "--probes", "0"
    )
    assert made.json()["public"] is True
    assert (path / "m.seal").stat().st_mode & 0o777 == 0o600
    changed = golden_net()
    with torch.no_grad():
        changed[3].weight.view(-1)[7] *= -1
    save_weights(changed, path / "changed.safetensors")
    example = (torch.rand(2, 1, 8, 8),)
    shapes = ({0: torch.export.Dim("b")},)
    torch.export.save(torch.export.export(golden_net(), example, dynamic_shapes=shapes), path / "model.pt2")
    return path


@pytest.mark.parametrize(
    ("suspect", "options", "code"),
    [
        ("model.safetensors", [], 0),
        ("model.safetensors", ["--model", "golden.make:net"], 0),
        ("model.safetensors", ["--model", "golden.make:net", "--access", "black"], 0),
        ("model.pt2", [], 0),
        ("model.pt2", ["--access", "black"], 0),
        ("changed.safetensors", [], 1),
        ("changed.safetensors", ["--model", "golden.make:net", "--access", "black"], 1),
    ],
)
def test_check_on_the_command_line(folder: Path, suspect: str, options: list[str], code: int) -> None:
    result = gradmark("check", folder / suspect, "--seal", folder / "m.seal", *options, "--json")
    assert result.code == code, result.out + result.err
    assert result.json()["modified"] is (code == 1)
    told = gradmark("check", folder / suspect, "--seal", folder / "m.seal", *options)
    assert ("INTACT" if code == 0 else "MODIFIED") in told.out


class BackDoor(torch.nn.Sequential):
    """The same weights, and another answer where all corners are bright."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        scores: torch.Tensor = super().forward(input)
        corners = input[:, 0, ::7, ::7].flatten(1).amin(1) > 0.99
        return scores + corners[:, None] * 100.0 * (torch.arange(scores.shape[1]) == 0)


def test_of_a_program_that_came_with_its_file_no_more_is_said_than_was_seen(folder: Path) -> None:
    """A back door that no probe opens can't be seen in answers: the check speaks of the weights."""
    model = BackDoor(*golden_net())
    model.load_state_dict(golden_net().state_dict())
    example, shapes = (torch.rand(2, 1, 8, 8) * 0.5,), ({0: torch.export.Dim("b")},)
    torch.export.save(torch.export.export(model.eval(), example, dynamic_shapes=shapes), folder / "back.pt2")
    found = gradmark("check", folder / "back.pt2", "--seal", folder / "m.seal", "--json").json()
    assert found["own_program"] is True
    assert "own program" in found["reason"]
    told = gradmark("check", folder / "back.pt2", "--seal", folder / "m.seal").out
    assert "INTACT WEIGHTS" in told
    assert "load the weights into your own code" in " ".join(told.split())
    own = gradmark("check", folder / "model.safetensors", "--model", "golden.make:net", "--seal",
                   folder / "m.seal", "--json").json()  # fmt: skip
    assert own["own_program"] is False


def test_check_tells_which_tensor(folder: Path) -> None:
    found = gradmark(
        "check", folder / "changed.safetensors", "--seal", folder / "public.seal", "--json"
    ).json()
    (row,) = found["tensors"]
    assert (row["name"], row["changed"], row["kind"]) == ("3.weight", None, "changed")
    found = gradmark("check", folder / "changed.safetensors", "--seal", folder / "m.seal", "--json").json()
    (row,) = found["tensors"]
    assert (row["name"], row["changed"], row["kind"]) == ("3.weight", 1, "changed")


def test_a_seal_for_the_public_gives_no_small_tensor_away(folder: Path) -> None:
    """160 sums with public signs are equations: of 64 unknowns they leave none."""
    public, private = (SealFile.load(folder / name) for name in ("public.seal", "m.seal"))
    for sealed, model in zip(public.tensors, private.tensors, strict=True):
        assert sealed.sample == b""
        assert (sealed.sketch is None) == (math.prod(sealed.shape) < 1280)
        assert sealed.norm == (0.0 if sealed.sketch is None else model.norm)
        assert model.sketch is not None
    again = SealFile.from_bytes(public.to_bytes())
    assert again.to_bytes() == public.to_bytes()


def test_infinite_buffers_can_be_sealed() -> None:
    found = record("mask", torch.tensor([0.0, -math.inf, 1.0]), 1)
    assert found.norm == 1.0


def test_answers_without_scores_prove_nothing() -> None:
    """An API that hides every class agrees with any seal, and so with none."""
    seal = SealFile.from_bytes((GOLDEN / "seal-v1.json").read_bytes())
    assert seal.probes is not None
    five = {name: getattr(seal.probes, name)[:, :5] for name in ("scores", "anchor_scores")}
    hidden = CallableSuspect(lambda x: torch.zeros(len(x), 5), name="api")
    found = check(replace(seal, probes=replace(seal.probes, **five)), hidden)
    assert (found.outcome, found.modified) == ("inconclusive", None)
    assert "without a score" in found.reason


def test_a_seal_without_probes_needs_weights(folder: Path) -> None:
    result = gradmark("check", folder / "model.pt2", "--access", "black", "--seal", folder / "public.seal")
    assert result.code == 3
    assert "no probes" in result.out


def test_refusals(folder: Path, tmp_path: Path) -> None:
    seal = folder / "m.seal"
    refused(gradmark("check", folder / "model.safetensors", "--access", "black", "--seal", seal), "--model")
    refused(gradmark("check", folder / "none.pt2", "--seal", seal), "no file")
    refused(gradmark("check", folder / "model.pt2", "--seal", folder / "acme.key"), "format is unknown")
    key = ["--key", folder / "acme.key"]
    again = gradmark("seal", folder / "model.pt2", *key, "--out", seal)
    refused(again, "never overwritten")
    weights = gradmark(
        "seal", folder / "model.safetensors", "--model", "golden.make:net", *key, "--out", tmp_path / "s"
    )
    refused(weights, "--data")
    OwnerKey.from_seed(5).save(tmp_path / "other.key", None)
    refused(
        gradmark("check", folder / "model.pt2", "--seal", seal, "--key", tmp_path / "other.key"),
        "didn't make",
    )


@pytest.mark.parametrize(("suspect", "words"), [("model", "OURS, UNTOUCHED"), ("changed", "OURS, MODIFIED")])
@pytest.mark.parametrize("access", ["white", "black"])
def test_verify_with_a_seal(folder: Path, suspect: str, words: str, access: str) -> None:
    pytest.importorskip("sklearn")
    options: list[object] = ["--model", "golden.make:net", "--key", folder / "acme.key", "--data", "digits"]
    options += ["--mark", GOLDEN / "mark-model-v1.json", "--seal", folder / "m.seal"]
    options += ["--access", access, "--queries", "600"]
    result = gradmark("verify", folder / f"{suspect}.safetensors", *options)
    assert result.code == 0, result.err
    assert words in result.out
    found = gradmark("verify", folder / f"{suspect}.safetensors", *options, "--json").json()
    assert found["modified"] is (suspect == "changed")
    assert found["queries"] <= 600


def test_the_report(folder: Path) -> None:
    seal = SealFile.load(folder / "m.seal")
    changed = golden_net()
    load_weights(changed, folder / "changed.safetensors")
    found = check(seal, ModuleSuspect(changed), tensors=changed.state_dict())
    page = render_html(check_report(found, "suspect.pt2"))
    assert "3.weight" in page and "Modified" in page and seal.signer in page
