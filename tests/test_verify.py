"""The only judge, and one marked network seen in every way that a suspect can be."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from conformance import CARRIERS, CLASSES, KEY, SPECS, mark_file, network, pool, trained, white
from gradmark.codec import MarkFile
from gradmark.endpoint import serve
from gradmark.errors import MarkFileError, MismatchError, ModelError, UnknownNameError, UsageError
from gradmark.keys import OwnerKey
from gradmark.protocols import BlackBox, Reading, Verdict, WhiteBox
from gradmark.suspects import CallableSuspect, HttpSuspect, open_suspect, save_weights
from gradmark.verify import judge, verify

NAME, DOMAIN = "filter-gradient", "grey"


def readings(n: int, right: int, zeros: int = 0, access: Any = "white") -> Reading:
    """``right`` of ``n`` bits with the right sign, then ``zeros`` of the right ones silenced."""
    generator = torch.Generator().manual_seed(n)
    bits = torch.randint(2, (n,), generator=generator).double() * 2 - 1
    values = bits * (1 + torch.rand(n, generator=generator, dtype=torch.float64))
    values[right:] *= -1
    values[:zeros] = 0
    return Reading(values, bits, 10, 0, access)


def judged(reading: Reading, alpha: float = 1e-6, tried: int = 1, test: Any = "sign") -> Verdict:
    return judge(
        reading, test, scheme="s", mark="m", suspect="x", alpha=alpha, keys_tried=tried, seconds=0.12345
    )


# --- judge ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("test", ["sign", "signed-rank", "sign-flip"])
def test_a_perfect_match_is_as_unlikely_as_all_heads(test: Any) -> None:
    verdict = judged(readings(64, 64), test=test)
    assert verdict.log10_p == pytest.approx(-64 * math.log10(2))
    assert (verdict.outcome, verdict.n_match, verdict.match, verdict.ties) == ("owned", 64, 1.0, 0)


def test_the_p_value_is_the_binomial_tail() -> None:
    exact = sum(math.comb(64, k) for k in range(50, 65)) / 2**64
    assert judged(readings(64, 50)).log10_p == pytest.approx(math.log10(exact))


@pytest.mark.parametrize("test", ["sign", "signed-rank", "sign-flip"])
def test_an_inverted_mark_is_no_evidence(test: Any) -> None:
    verdict = judged(readings(64, 0), test=test)
    assert (verdict.outcome, verdict.n_match) == ("no-evidence", 0)
    assert verdict.log10_p == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize(("n", "outcome"), [(19, "inconclusive"), (20, "owned")])
def test_too_few_bits_are_inconclusive(n: int, outcome: str) -> None:
    """2^-19 is more than 1e-6 and 2^-20 less: with 19 bits not even a perfect match could do."""
    verdict = judged(readings(n, n))
    assert verdict.outcome == outcome
    assert ("too few" in verdict.reason) == (outcome == "inconclusive")
    assert judged(readings(n, 3)).outcome == ("inconclusive" if n == 19 else "no-evidence")


def test_parts_need_more_bits_between_them() -> None:
    """Two parts of ten bits can't reach what twenty bits in one can: Fisher's product costs something."""
    verdicts = {n: judged(replace(readings(n, n), parts=(10, n - 10))) for n in (20, 24, 25)}
    assert verdicts[20].log10_p == pytest.approx(-20 * math.log10(2) + math.log10(1 + 20 * math.log(2)))
    assert {n: v.outcome for n, v in verdicts.items()} == {
        20: "inconclusive",
        24: "inconclusive",
        25: "owned",
    }
    silent = judged(replace(readings(25, 25, zeros=10), parts=(10, 15)))
    assert (silent.outcome, silent.ties) == ("inconclusive", 10)
    wrong = judged(replace(readings(64, 0), parts=(10, 54)))
    assert (wrong.outcome, wrong.log10_p) == ("no-evidence", pytest.approx(0, abs=1e-12))


def test_ties_are_dropped_and_told() -> None:
    verdict = judged(readings(64, 64, zeros=44))
    assert (verdict.outcome, verdict.ties, verdict.n_match, verdict.match) == ("owned", 44, 20, 1.0)
    assert verdict.log10_p == pytest.approx(-20 * math.log10(2))
    assert judged(readings(64, 64, zeros=45)).outcome == "inconclusive"
    nothing = judged(readings(64, 64, zeros=64))
    assert (nothing.outcome, nothing.log10_p, nothing.match) == ("inconclusive", 0.0, 0.0)


def test_the_threshold_itself_counts_as_reached() -> None:
    alpha = 2.0**-20
    assert judged(readings(20, 20), alpha=alpha).outcome == "owned"
    assert judged(readings(20, 20), alpha=alpha * 0.999).outcome == "inconclusive"
    assert judged(readings(20, 19), alpha=alpha).outcome == "no-evidence"


def test_every_key_tried_is_paid_for() -> None:
    one, many = judged(readings(30, 30)), judged(readings(30, 30), tried=1000)
    assert many.log10_p == pytest.approx(one.log10_p + 3)
    assert (one.outcome, many.outcome, many.keys_tried) == ("owned", "owned", 1000)
    assert judged(readings(30, 30), tried=2000).outcome == "inconclusive"
    assert judged(readings(64, 20), tried=10**6).log10_p == 0.0


def test_readings_that_arent_numbers_are_refused() -> None:
    reading = readings(30, 30)
    reading.values[3] = math.nan
    with pytest.raises(ModelError, match="NaN"):
        judged(reading)


def test_a_verdict_is_flat_json() -> None:
    import json

    verdict = judged(readings(30, 30))
    body = json.loads(json.dumps(verdict.to_json(), allow_nan=False))
    names = "outcome modified log10_p alpha test n_bits n_match ties match carriers queries access scheme"
    assert set(names.split()) | {"mark", "suspect", "keys_tried", "seconds", "version"} <= set(body)
    assert "reading" not in body
    assert body["modified"] is None


# --- verify -----------------------------------------------------------------------------------------------


def marked() -> nn.Module:
    return trained(NAME, DOMAIN)


def ask(suspect: Any, key: OwnerKey = KEY, **more: Any) -> Verdict:
    return verify(mark_file(NAME, DOMAIN), key, suspect, more.pop("data", pool(DOMAIN)), **more)


@pytest.mark.parametrize(
    "more",
    [
        {"alpha": 0.0},
        {"alpha": 1.0},
        {"alpha": math.nan},
        {"keys_tried": 0},
        {"access": "black", "queries": 1},
        {"access": "black", "queries": -5},
    ],
)
def test_settings_without_sense_are_refused(more: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="make no sense"):
        ask(white(marked()), **more)


def test_a_key_of_another_mark_is_refused() -> None:
    for key in (OwnerKey.from_seed(2, "Owner"), OwnerKey.from_seed(1, "Somebody")):
        with pytest.raises(MismatchError, match="key doesn't belong"):
            ask(white(marked()), key)


def test_access_follows_from_the_suspect() -> None:
    api = CallableSuspect(marked(), name="api")
    assert ask(white(marked())).access == "white"
    assert ask(white(marked()), access="black").access == "black"
    assert ask(api).access == "black"
    with pytest.raises(MismatchError, match="model itself"):
        ask(api, access="white")


def test_the_verdict_names_what_was_judged() -> None:
    verdict, file = ask(white(marked())), mark_file(NAME, DOMAIN)
    assert (verdict.scheme, verdict.mark, verdict.test) == (file.scheme, file.digest, file.test)
    assert verdict.suspect == white(marked()).digest
    assert (verdict.n_bits, verdict.carriers, verdict.queries) == (64, CARRIERS, 0)


def other_classes(x: Tensor) -> Tensor:
    return marked()(x)[:, :7]


def nan_sometimes(x: Tensor) -> Tensor:
    out = marked()(x).clone()
    out[len(out) // 2] = math.nan
    return out


@pytest.mark.parametrize(
    ("fn", "error", "words"),
    [
        (other_classes, MismatchError, "10 classes"),
        (nan_sometimes, ModelError, "NaN"),
        (lambda x: marked()(x)[0], ModelError, "shape"),
        (lambda x: marked()(x)[:-1], ModelError, "shape"),
        (lambda x: "cat", ModelError, "no class scores"),
        (lambda x: marked()(x) * math.inf, ModelError, "finite"),
    ],
)
def test_suspects_that_answer_nonsense_are_refused(fn: Any, error: Any, words: str) -> None:
    with pytest.raises(error, match=words):
        ask(CallableSuspect(fn, name="api"))


def test_a_module_of_other_classes_is_refused() -> None:
    with pytest.raises((MismatchError, ModelError)):
        ask(white(nn.Sequential(nn.Flatten(), nn.Linear(64, 7))))
    with pytest.raises(ModelError):
        ask(white(network("vector")))


def test_data_that_doesnt_fit_is_refused() -> None:
    x, labels = pool(DOMAIN)
    with pytest.raises(MismatchError, match="data doesn't fit"):
        ask(white(marked()), data=pool("vector"))
    for shift in (1, -1):
        with pytest.raises(MismatchError, match="0 to 9"):
            ask(white(marked()), data=(x, labels + shift))


def test_an_unknown_scheme_is_refused() -> None:
    from dataclasses import replace

    file = mark_file(NAME, DOMAIN)
    good = {"key": KEY, "suspect": white(marked()), "pool": pool(DOMAIN)}
    for change, error in (
        ({"scheme": "filter-gradeint"}, UnknownNameError),
        ({"scheme_parameters": {"colour": 1}}, MarkFileError),
    ):
        blank = replace(file, **change)
        forged = replace(blank, commitment=KEY.commit(blank.statement(), blank.salt))
        with pytest.raises(error):
            verify(forged, **good)


# --- one network, seen in every way -----------------------------------------------------------------------


def small() -> nn.Module:
    """The factory that goes with the weights file."""
    return network(DOMAIN)


@contextmanager
def module(folder: Path) -> Iterator[BlackBox]:
    yield open_suspect(marked())


@contextmanager
def exported(folder: Path) -> Iterator[BlackBox]:
    batch = torch.export.Dim("batch", min=1, max=1024)
    program = torch.export.export(
        marked(), (pool(DOMAIN)[0][:4],), dynamic_shapes=({0: batch},), strict=False
    )
    torch.export.save(program, folder / "model.pt2")
    yield open_suspect(folder / "model.pt2")


@contextmanager
def weights(folder: Path) -> Iterator[BlackBox]:
    save_weights(marked(), folder / "model.safetensors")
    sys.modules["gradmark_test_factory"] = sys.modules[__name__]
    try:
        yield open_suspect(folder / "model.safetensors", model="gradmark_test_factory:small")
    finally:
        del sys.modules["gradmark_test_factory"]


@contextmanager
def onnx(folder: Path) -> Iterator[BlackBox]:
    for needed in ("onnx", "onnxruntime", "onnxscript"):
        pytest.importorskip(needed)
    example = (pool(DOMAIN)[0][:4],)
    shapes = ({0: torch.export.Dim("batch", min=1, max=1024)},)
    torch.onnx.export(
        marked(), example, folder / "model.onnx", dynamo=True, dynamic_shapes=shapes, verbose=False
    )
    yield open_suspect(folder / "model.onnx")


@contextmanager
def probabilities(folder: Path) -> Iterator[BlackBox]:
    yield CallableSuspect(lambda x: marked()(x).softmax(1).numpy(), name="api")


@contextmanager
def web(folder: Path) -> Iterator[BlackBox]:
    pytest.importorskip("httpx2")

    def predict(x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        with torch.no_grad():
            return marked()(torch.from_numpy(x)).double().softmax(1).numpy()

    with serve(predict) as address:
        suspect = HttpSuspect(address)
        try:
            yield suspect
        finally:
            suspect.close()


WAYS: list[Callable[[Path], Any]] = [module, exported, weights, onnx, probabilities, web]


@pytest.mark.parametrize("way", WAYS)
def test_every_way_of_asking_reads_the_same(
    way: Callable[[Path], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NO_PROXY", "*")
    straight = {access: ask(white(marked()), access=access, queries=800) for access in ("white", "black")}
    with way(tmp_path) as suspect:
        for access in ("white", "black") if isinstance(suspect, WhiteBox) else ("black",):
            verdict, expected = ask(suspect, access=access, queries=800), straight[access]
            assert verdict.reading is not None
            assert expected.reading is not None
            scale = float(expected.reading.values.abs().max())
            torch.testing.assert_close(
                verdict.reading.values, expected.reading.values, rtol=1e-3, atol=1e-3 * scale
            )
            assert verdict.queries == expected.queries
            assert verdict.outcome == "owned"
            assert verdict.suspect.startswith("sha256:")
            assert verdict.log10_p == pytest.approx(expected.log10_p, abs=1.0)


@pytest.mark.parametrize("decimals", [4, 3, 2])
def test_rounded_probabilities_can_still_be_read(decimals: int) -> None:
    """Rounding silences many wrong classes: ties, fewer bits, but no infinite difference and no error."""
    rounded = CallableSuspect(lambda x: marked()(x).softmax(1).double().round(decimals=decimals), name="api")
    fine = CallableSuspect(lambda x: marked()(x).softmax(1), name="api")
    coarse, smooth = ask(rounded, queries=1600), ask(fine, queries=1600)
    assert coarse.reading is not None
    assert smooth.reading is not None
    assert float(coarse.reading.values.abs().max()) < 3 * float(smooth.reading.values.abs().max())
    if decimals == 4:
        assert coarse.outcome == "owned"
    stranger = trained(NAME, DOMAIN, marked=False)
    innocent = CallableSuspect(lambda x: stranger(x).softmax(1).double().round(decimals=decimals), name="api")
    assert ask(innocent, queries=1600).outcome != "owned"


def test_probabilities_read_white_box_as_their_logits_do() -> None:
    """The chain rule through the logarithm, which contrasts that sum to zero make exact."""
    logits, soft = ask(white(marked())), ask(white(nn.Sequential(marked(), nn.Softmax(1))))
    assert logits.reading is not None
    assert soft.reading is not None
    a, b = logits.reading.values, soft.reading.values
    torch.testing.assert_close(b, a, rtol=1e-2, atol=1e-2 * float(a.abs().max()))


def test_the_network_has_its_classes() -> None:
    assert SPECS[DOMAIN].n_classes == CLASSES == marked()(pool(DOMAIN)[0][:1]).shape[1]


@pytest.mark.parametrize("change", [lambda x: 255 * x, lambda x: (x - 0.5) / 0.25, lambda x: -x])
def test_data_of_another_range_are_refused(change: Any) -> None:
    """Pixels of 0 to 255, or normalised ones: a data mistake must not look like no evidence."""
    x, labels = pool(DOMAIN)
    with pytest.raises(MismatchError, match="Expected 0 to 1"):
        verify(mark_file(NAME, DOMAIN), KEY, white(marked()), (change(x), labels))


def test_what_was_allowed_is_told_beside_what_was_sent() -> None:
    file = mark_file(NAME, DOMAIN)
    verdict = verify(file, KEY, white(marked()), pool(DOMAIN), access="black", queries=1001)
    assert verdict.queries <= verdict.queries_allowed == 1001
    again = verify(file, KEY, white(marked()), pool(DOMAIN), access="black", queries=verdict.queries_allowed)
    assert again.log10_p == verdict.log10_p


def test_a_hostile_marks_secrets_are_never_drawn() -> None:
    """Its data don't fit: that is seen before anything of its absurd size is made."""
    huge = replace(SPECS[DOMAIN], input_shape=(1, 46000, 46000))
    file = MarkFile.create(KEY, "trigger", {}, huge, "signed-rank", CARRIERS)
    with pytest.raises(MismatchError, match="data doesn't fit"):
        verify(file, KEY, white(marked()), pool(DOMAIN))
