"""Reference readings: sealed, projected out, and drawn before the bits, so that nobody can choose them."""

from __future__ import annotations

import base64
import struct
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from cryptography.hazmat.primitives.ciphers.aead import AESSIV
from torch import Tensor

from conformance import KEY, SPECS, Counting, inputs, network, white
from gradmark.errors import MarkFileError
from gradmark.keys import OwnerKey
from gradmark.reference import natural, seal, unseal, without
from gradmark.schemes.class_contrast import ClassContrast
from gradmark.schemes.filter_gradient import FilterGradient
from gradmark.stats import ks_uniform, randomised_p, sign_test

CONTEXT, N = b"context", 37
SPEC, POOL = SPECS["vector"], inputs("vector", 60, seed=4)
SCHEMES = [FilterGradient(bits=32, step=0.1), ClassContrast(bits=40)]
schemes = pytest.mark.parametrize("scheme", SCHEMES, ids=lambda s: s.name)


def normal(seed: int, n: int = N) -> Tensor:
    return torch.randn(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def sealed(scheme: Any, values: Tensor, key: OwnerKey = KEY) -> Any:
    """The scheme with these reference readings, whoever made them up."""
    return replace(scheme, reference=seal(key, values, scheme.mark(key, SPEC).context))


# --- sealing ----------------------------------------------------------------------------------------------


def test_numbers_come_back_as_float32() -> None:
    values = normal(1)
    text = seal(KEY, values, CONTEXT)
    found = unseal(KEY, text, CONTEXT, N)
    assert found.dtype == torch.float64
    assert torch.equal(found, values.float().double())
    assert text == seal(KEY, values.float(), CONTEXT) == seal(KEY, found, CONTEXT)


def test_the_text_is_what_the_formats_page_says() -> None:
    """AES-SIV under 64 derived bytes; the context is the one associated datum."""
    values = normal(1)
    cipher = AESSIV(KEY.derive("reference", 64, context=CONTEXT))
    data = cipher.decrypt(base64.b64decode(seal(KEY, values, CONTEXT)), [CONTEXT])
    assert list(struct.unpack(f"<{N}f", data)) == values.float().tolist()


def test_other_keys_contexts_and_numbers_give_other_texts() -> None:
    changed = normal(1)
    changed[3] = torch.nextafter(changed[3].float(), torch.tensor(9.0)).double()
    texts = [
        seal(KEY, normal(1), CONTEXT),
        seal(OwnerKey.from_seed(2, "Owner"), normal(1), CONTEXT),
        seal(KEY, normal(1), b"another"),
        seal(KEY, changed, CONTEXT),
    ]
    assert len({text[:22] for text in texts}) == 4


def other_ending(text: str) -> str:
    """Base64 of the same bytes that nobody should have written: unused bits of the last letter set."""
    letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
    body = text.rstrip("=")
    changed = body[:-1] + letters[letters.index(body[-1]) + 1] + text[len(body) :]
    assert base64.b64decode(changed) == base64.b64decode(text)
    return changed


@pytest.mark.parametrize(
    "bend",
    [
        lambda text: "",
        lambda text: text[:-4],
        lambda text: text[4:],
        lambda text: text[:40] + ("A" if text[40] != "A" else "B") + text[41:],
        lambda text: text + "\n",
        lambda text: "é" + text[1:],
        lambda text: base64.b64encode(b"short").decode(),
        lambda text: 5,
        other_ending,
    ],
)
def test_a_changed_text_is_refused(bend: Any) -> None:
    text = seal(KEY, normal(1), CONTEXT)
    with pytest.raises(MarkFileError, match="can't be opened"):
        unseal(KEY, bend(text), CONTEXT, N)


def test_a_wrong_key_context_or_length_is_refused() -> None:
    text = seal(KEY, normal(1), CONTEXT)
    with pytest.raises(MarkFileError, match="can't be opened"):
        unseal(OwnerKey.from_seed(2, "Owner"), text, CONTEXT, N)
    with pytest.raises(MarkFileError, match="can't be opened"):
        unseal(KEY, text, b"another", N)
    for n in (N - 1, N + 1, 0):
        with pytest.raises(MarkFileError, match=f"{n} numbers"):
            unseal(KEY, text, CONTEXT, n)
    for bad in (float("nan"), float("inf")):
        values = normal(1)
        values[5] = bad
        with pytest.raises(MarkFileError, match="don't fit"):
            unseal(KEY, seal(KEY, values, CONTEXT), CONTEXT, N)


@schemes
def test_another_marks_reference_is_refused(scheme: Any) -> None:
    """The context holds scheme, parameters and spec: a text can't be moved between marks or keys."""
    n = len(scheme.mark(KEY, SPEC).bits)
    good = sealed(scheme, normal(1, n))
    with pytest.raises(MarkFileError, match="can't be opened"):
        good.mark(OwnerKey.from_seed(2, "Owner"), SPEC)
    with pytest.raises(MarkFileError, match="can't be opened"):
        good.mark(KEY, replace(SPEC, scale=2.0))
    with pytest.raises(MarkFileError, match="can't be opened"):
        replace(good, contrasts=4).mark(KEY, SPEC)
    with pytest.raises(MarkFileError, match="don't fit"):
        sealed(scheme, normal(1, n - 1)).mark(KEY, SPEC)


# --- projecting out ---------------------------------------------------------------------------------------


def test_what_is_left_knows_nothing_of_the_reference() -> None:
    values, reference = normal(1), normal(2)
    left = without(values, reference)
    share = np.linalg.lstsq(reference[:, None].numpy(), values.numpy(), rcond=None)[0]
    torch.testing.assert_close(left, values - float(share[0]) * reference)
    assert abs(float(left @ reference)) < 1e-12
    torch.testing.assert_close(left + natural(values, reference), values)
    torch.testing.assert_close(without(left, reference), left)


def test_the_size_of_neither_matters() -> None:
    """A reference of another scale, sign or precision takes away the same; what is left scales."""
    values, reference = normal(1), normal(2)
    left = without(values, reference)
    for scale in (1e-6, -1.0, 40.0, 1e30):
        torch.testing.assert_close(without(values, scale * reference), left)
        torch.testing.assert_close(without(scale * values, reference), scale * left)
    torch.testing.assert_close(without(values.float(), reference), left.float())


def test_readings_of_zero_stay_none() -> None:
    values, reference = normal(1), normal(2)
    values[[0, 7, 30]] = 0
    left = without(values, reference)
    assert torch.equal(left == 0, values == 0)
    kept = values != 0
    torch.testing.assert_close(left[kept], without(values[kept], reference[kept]))
    assert torch.equal(without(torch.zeros(N), reference), torch.zeros(N))


def test_without_a_reference_nothing_is_taken_away() -> None:
    assert torch.equal(without(normal(1), None), normal(1))
    assert torch.equal(without(normal(1), torch.zeros(N)), normal(1))


# --- bits after the reference -----------------------------------------------------------------------------


@schemes
def test_bits_are_drawn_after_the_reference(scheme: Any) -> None:
    """Any change of the reference draws other bits: it can't be fitted to them. All else stays."""
    plain = scheme.mark(KEY, SPEC)
    values = normal(1, len(plain.bits))
    nudged = values.clone()
    nudged[3] = torch.nextafter(values[3].float(), torch.tensor(9.0)).double()
    marks = [plain, *(sealed(scheme, v).mark(KEY, SPEC) for v in (values, nudged, -values, 2 * values))]
    assert len({tuple(mark.bits.tolist()) for mark in marks}) == 5
    x, labels = POOL
    for mark in marks[1:]:
        assert torch.equal(mark.contrasts, plain.contrasts)
        assert torch.equal(mark.order(50), plain.order(50))
        if isinstance(scheme, FilterGradient):
            a, b = (m.directions.all(x[:3], m.group(labels[:3])) for m in (mark, plain))
            assert torch.equal(a, b)
    again = sealed(scheme, values).mark(KEY, SPEC)
    assert torch.equal(again.bits, marks[1].bits)
    assert torch.equal(again.reference, values.float().double())


@schemes
def test_bits_of_other_references_are_independent(scheme: Any) -> None:
    plain = scheme.mark(KEY, SPEC)
    n, rounds = len(plain.bits), 60
    bits = torch.stack([sealed(scheme, normal(s, n)).mark(KEY, SPEC).bits for s in range(rounds)])
    four_sigma = 4 * (n * rounds) ** 0.5
    assert abs(float(bits.sum())) < four_sigma
    assert abs(float((bits * plain.bits).sum())) < four_sigma
    assert abs(float((bits[1:] * bits[:-1]).sum())) < four_sigma


@pytest.mark.statistics
def test_a_reference_made_for_the_suspect_proves_nothing() -> None:
    """Knowing the secret directions and the suspect's readings ``v``, one can choose the reference so that
    what is left of ``v`` equals *any* given bits: ``v - t b`` leaves ``t b``, with ``t = v.b / n``.
    But those aren't the bits any more. So innocent networks' p-values stay uniform."""
    scheme: Any = SCHEMES[0]
    mark = scheme.mark(KEY, SPEC)
    generator, p_values, n = np.random.default_rng(3), [], len(mark.bits)
    for seed in range(200):
        v = scheme.read(mark, white(network("vector", seed=seed)), POOL, access="white", carriers=8).values
        aim = mark.bits.double() * torch.sign(v @ mark.bits.double())
        reference = (v - (v @ aim / n) * aim).float().double()
        left = without(v, reference)
        assert bool((left * aim > 0).all()), "the attack works on bits that are known beforehand"
        assert sign_test((left * aim).numpy()).log10_p < -9
        bits = sealed(scheme, reference).mark(KEY, SPEC).bits.double()
        p_values.append(randomised_p("signed-rank", (left * bits).numpy(), generator))
    assert ks_uniform(p_values)[1] > 0.001
    assert min(p_values) > 1e-5


@pytest.mark.statistics
@schemes
def test_a_reference_of_the_suspect_itself_leaves_fair_coins(scheme: Any) -> None:
    """Calibrated by the suspect, or by one like it, readings are next to nothing; signs stay fair."""
    plain = scheme.mark(KEY, SPEC)
    v = scheme.read(plain, white(network("vector")), POOL, access="black", carriers=60, queries=600).values
    generator, p_values = np.random.default_rng(4), []
    for seed in range(200):
        near = v + 10.0 ** -(seed % 8) * v.std() * normal(seed, len(v))
        mark = sealed(scheme, near).mark(KEY, SPEC)
        left = without(v, mark.reference)
        p_values.append(randomised_p("signed-rank", (left * mark.bits.double()).numpy(), generator))
    assert ks_uniform(p_values)[1] > 0.001


# --- calibration ------------------------------------------------------------------------------------------


@schemes
def test_calibration_takes_a_networks_own_readings_away(scheme: Any) -> None:
    model = network("vector", seed=3)
    fitted = scheme.calibrated(KEY, SPEC, white(model), POOL)
    assert fitted == scheme.calibrated(KEY, SPEC, white(model), POOL), "deterministic"
    assert fitted.calibrated(KEY, SPEC, white(model), POOL) == fitted, "from the plain readings, always"
    assert replace(fitted, reference="") == scheme
    most = {"access": "black", "carriers": 60, "queries": 10**6}
    plain, mark = scheme.mark(KEY, SPEC), fitted.mark(KEY, SPEC)
    before = scheme.read(plain, white(model), POOL, **most)
    after = fitted.read(mark, white(model), POOL, **most)
    torch.testing.assert_close(mark.reference, before.values, rtol=1e-6, atol=1e-7)
    assert float(after.values.norm()) < 1e-5 * float(before.values.norm())
    assert torch.equal(after.bits, mark.bits.double())
    assert after.queries == before.queries


@schemes
def test_every_reading_is_less_the_reference(scheme: Any) -> None:
    """White-box, black-box, and each point of the history."""
    fitted = scheme.calibrated(KEY, SPEC, white(network("vector", seed=3)), POOL)
    plain, mark, model = scheme.mark(KEY, SPEC), fitted.mark(KEY, SPEC), network("vector", seed=5)
    for access, suspect in (("white", white(model)), ("black", Counting(model))):
        given = {"access": access, "carriers": 20, "queries": 300}
        a = scheme.read(plain, suspect, POOL, **given)
        b = fitted.read(mark, suspect, POOL, **given)
        torch.testing.assert_close(b.values, without(a.values, mark.reference))
        assert [n for n, _ in b.history] == [n for n, _ in a.history]
        for (_, before), (_, after) in zip(a.history, b.history, strict=True):
            torch.testing.assert_close(after, without(before, mark.reference))


def test_calibration_asks_natural_inputs_alone_for_class_contrasts() -> None:
    suspect = Counting(network("vector"))
    ClassContrast(bits=40).calibrated(KEY, SPEC, suspect, POOL)
    assert suspect.count == len(POOL[0])


def test_parameters_name_a_reference_only_where_there_is_one() -> None:
    """Marks made before references were known keep their bytes."""
    assert "reference" not in FilterGradient().parameters()
    text = seal(KEY, normal(1), CONTEXT)
    assert FilterGradient(reference=text).parameters()["reference"] == text
    assert FilterGradient(**FilterGradient(reference=text).parameters()).reference == text
