"""Whose copy is it: exact ranks of many licensees, their lists, their copies, and the two commands."""

from __future__ import annotations

import csv
import hashlib
import hmac
import json
import shutil
import stat
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from commandline import Outcome, gradmark, refused
from golden.make import CARRIERS, QUERIES, net
from golden.make_trace import OTHERS as OTHERS_V1
from gradmark import MarkFile, ModuleSuspect, OwnerKey
from gradmark.data import load_data
from gradmark.errors import DataError, GradmarkError, MarkFileError, MismatchError, UsageError
from gradmark.protocols import Access, TestName
from gradmark.report.tracing import all_licensees, trace_report
from gradmark.stats import TESTS, log10_ps, run_tests
from gradmark.suspects import load_weights, save_weights
from gradmark.tails import log10_tail_subset_sum, log10_tails_subset_sum
from gradmark.trace import Codebook, open_tracing, rank, read_licensees, trace
from gradmark.trace.licensees import checked, clean

GOLDEN = Path(__file__).parent / "golden"
GUILTY = ("Globex GmbH", "initech")
OTHERS = tuple(f"uninvolved-{i}" for i in range(200))


def signs_of(rng: np.random.Generator, m: int, n: int) -> Any:
    return (rng.integers(0, 2, (m, n)) * 2 - 1).astype(np.int8)


# -- exact tests of many rows at once


@pytest.mark.parametrize("name", TESTS)
@given(data=st.data())
def test_many_rows_agree_with_one_at_a_time(name: TestName, data: st.DataObject) -> None:
    values = data.draw(st.lists(st.integers(-6, 6).map(lambda v: v / 3), min_size=2, max_size=24))
    parts = data.draw(st.sampled_from([(), (1, len(values) - 1), (len(values) // 2, -(-len(values) // 2))]))
    signs = signs_of(np.random.default_rng(data.draw(st.integers(0, 99))), 5, len(values))
    found = log10_ps(name, values, signs, parts)
    slow = [run_tests(name, np.array(values) * row, parts).log10_p if any(values) else 0.0 for row in signs]
    assert found == pytest.approx(slow, abs=1e-9)


@given(st.lists(st.integers(0, 40), min_size=1, max_size=12))
def test_all_tails_agree_with_each(weights: list[int]) -> None:
    tails = log10_tails_subset_sum(weights)
    assert len(tails) == sum(weights) + 1
    for s, value in enumerate(tails):
        assert value == pytest.approx(log10_tail_subset_sum(weights, s), abs=1e-9)


def test_tails_refuse_what_they_cannot_count() -> None:
    for weights in ([-1, 2], [10**9, 10**9]):
        with pytest.raises(UsageError):
            log10_tails_subset_sum(weights)


# -- ranking


@pytest.mark.statistics
@pytest.mark.parametrize("colluders", [0, 2])
def test_innocents_are_named_no_oftener_than_alpha(colluders: int) -> None:
    """300 searches among 30, at a level where errors show: at most alpha in all rounds together."""
    rng, alpha, wrong = np.random.default_rng(colluders), 0.25, 0
    for _ in range(300):
        signs = signs_of(rng, 30, 60)
        values = rng.normal(size=60) * rng.gamma(1, size=60) + signs[:colluders].sum(0)
        found = rank(values, signs, test="sign-flip", alpha=alpha, parts=(40, 20)).found
        wrong += any(f.index >= colluders for f in found)
    assert wrong <= 300 * alpha + 3 * (300 * alpha * (1 - alpha)) ** 0.5
    assert wrong >= 20, "not even chance is at work: the correction is wrong"


def test_colluders_are_found_one_after_the_other() -> None:
    rng = np.random.default_rng(7)
    signs = signs_of(rng, 5000, 200)
    values = 3 * signs[11] + signs[22] + 0.9 * signs[33] + 0.3 * rng.normal(size=200)
    ranking = rank(values, signs, test="sign-flip", alpha=1e-6)
    assert {f.index for f in ranking.found} == {11, 22, 33}
    assert ranking.found[0].index == 11
    assert ranking.found[0].round == 1
    assert ranking.found[-1].round > 1, "the strongest hides nobody: the test shows nothing"
    assert ranking.log10_p.argmin() == 11
    assert all(f.log10_p <= -6 for f in ranking.found)


def test_p_is_corrected_for_licensees_keys_and_rounds() -> None:
    rng = np.random.default_rng(3)
    signs = signs_of(rng, 1000, 80)
    values = signs[5] * 1.0
    one = rank(values, signs[5:6], test="sign", alpha=1e-6).log10_p[0]
    assert one == pytest.approx(np.log10(2.0) * (1 - 80))
    many = rank(values, signs, test="sign", alpha=1e-6, tried=7).log10_p[5]
    assert many == pytest.approx(one + 3 + np.log10(7))


def test_readings_of_zero_name_nobody() -> None:
    signs = signs_of(np.random.default_rng(0), 10, 12)
    ranking = rank(np.zeros(12), signs, test="sign-flip", alpha=0.5, parts=(6, 6))
    assert not ranking.found
    assert (ranking.log10_p == 0).all()


# -- bits


def test_bits_are_hkdf_expand_of_the_name() -> None:
    """RFC 5869, section 2.3, by hand."""
    book, name = Codebook(bytes(range(32)), 300), "Älf & Co"
    first = hmac.digest(book.secret, name.encode() + b"\1", hashlib.sha256)
    second = hmac.digest(book.secret, first + name.encode() + b"\2", hashlib.sha256)
    bits = np.unpackbits(np.frombuffer(first + second, dtype=np.uint8))[:300]
    assert (book.table(["other", name])[1] == bits.astype(int) * 2 - 1).all()
    assert "secret" not in repr(book)


def test_bits_differ_between_licensees_and_are_fair() -> None:
    table = Codebook(bytes(32), 256).table([f"l{i}" for i in range(500)]).astype(float)
    assert abs(table.mean()) < 4 / (500 * 256) ** 0.5
    alike = table @ table.T / 256
    np.fill_diagonal(alike, 0)
    assert abs(alike).max() < 0.4


# -- lists of licensees


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.txt", "\ufeffGlobex\r\n\n  Über AG \nx\n"),
        ("a.json", '["Globex", "\\u00dcber AG", "x"]'),
        ("a.csv", "Globex,1\nÜber AG,2\nx,3\n"),
        ("b.csv", "since,Licensee\n2024,Globex\n2025,U\u0308ber AG\n2026,x\n"),
    ],
)
def test_lists_are_read(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / name).write_text(content, encoding="utf-8", newline="")
    assert read_licensees(tmp_path / name) == ["Globex", "Über AG", "x"]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.txt", b"", "Nobody"),
        ("a.txt", b"a\nb\na\n", "twice"),
        ("a.txt", b"\xff\xfe", "UTF-8"),
        ("a.txt", b"a\x07b\n", "control"),
        ("a.txt", b"x" * 201, "200"),
        ("a.json", b"{}", "JSON list"),
        ("a.json", b"[1]", "JSON list"),
        ("a.json", b"[" * 100_000, "JSON list"),
        ("a.csv", b"id\n", "Nobody"),
    ],
)
def test_bad_lists_are_refused(tmp_path: Path, name: str, content: bytes, words: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=words):
        read_licensees(tmp_path / name)


@given(st.binary(max_size=60), st.sampled_from([".txt", ".json", ".csv"]))
def test_any_bytes_give_names_or_a_typed_error(content: bytes, suffix: str) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"list{suffix}"
        path.write_bytes(content)
        try:
            names = read_licensees(path)
        except GradmarkError:
            return
        assert names == checked(names)
        assert all(clean(name) == name for name in names)


# -- copies and commands


@pytest.fixture(scope="module")
def issued(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base/ with the golden ensemble, copies/ of two licensees made from it, and all.txt."""
    folder = tmp_path_factory.mktemp("issued")
    (folder / "base").mkdir()
    shutil.copy(GOLDEN / "mark-ensemble-v1.json", folder / "base" / "mark.json")
    shutil.copy(GOLDEN / "golden-ensemble-v1.safetensors", folder / "base" / "model.safetensors")
    (folder / "all.txt").write_text("\n".join((*OTHERS[:99], *GUILTY, *OTHERS[99:])) + "\n", encoding="utf-8")
    result = make(folder, *(part for name in GUILTY for part in ("--licensee", name)), "--json")
    assert result.code == 0, result.out + result.err
    (folder / "license.json").write_text(result.out)
    return folder


def make(folder: Path, *more: object) -> Outcome:
    return gradmark(
        "license", "--mark", folder / "base" / "mark.json", "--model", "golden.make:net", "--data", "digits",
        "--key", GOLDEN / "key-v1.json", "--out", folder / "copies", "--set", "step=0.1", "--set", "bits=96",
        "--epochs", 8, "--strength", 2, "--anchor", 1, *more,
    )  # fmt: skip


def ask(folder: Path, suspect: Path, *more: object) -> Outcome:
    return gradmark(
        "trace", suspect, "--licensees", folder / "all.txt", "--key", GOLDEN / "key-v1.json",
        "--mark", folder / "base" / "mark.json", "--data", "digits", "--model", "golden.make:net", *more,
    )  # fmt: skip


def copy_of(folder: Path, number: int) -> Path:
    rows = json.loads((folder / "license.json").read_text())["copies"]
    return Path(rows[number]["folder"]) / "model.safetensors"


def mixed(folder: Path, name: str, number: int = 2) -> Path:
    models = [net() for _ in range(number)]
    for i, model in enumerate(models):
        load_weights(model, copy_of(folder, i))
    states = [model.state_dict() for model in models]
    models[0].load_state_dict({k: sum(s[k] for s in states) / number for k in states[0]})
    save_weights(models[0], folder / name)
    return folder / name


def test_copies_carry_both_marks(issued: Path) -> None:
    told = json.loads((issued / "license.json").read_text())
    assert told["outcome"] == "issued"
    assert [row["licensee"] for row in told["copies"]] == list(GUILTY)
    base = told["base_accuracy"][0]
    for row in told["copies"]:
        assert row["owned"]
        assert row["base_log10_p"] < -6
        assert row["log10_p"] < -11
        assert row["accuracy"][0] > base - 0.03
        place = Path(row["folder"])
        assert sorted(p.name for p in place.iterdir()) == ["model.safetensors", "run.json"]
        assert stat.S_IMODE((place / "run.json").stat().st_mode) == 0o600
    assert Path(told["copies"][1]["folder"]).name == "initech"
    assert Path(told["copies"][0]["folder"]).name.startswith("Globex-GmbH-")


def test_the_tracing_mark_is_a_committed_mark_file_that_names_nobody(issued: Path) -> None:
    text = (issued / "base" / "trace.json").read_text()
    mark, base = MarkFile.from_bytes(text.encode()), MarkFile.load(issued / "base" / "mark.json")
    key = OwnerKey.load(GOLDEN / "key-v1.json")
    assert mark.scheme_parameters["base"] == base.digest
    assert not [name for name in (*GUILTY, *OTHERS) if name in text]
    open_tracing(mark, key, base)
    with pytest.raises(MismatchError):
        open_tracing(mark, OwnerKey(bytes(32), "Acme Ltd"), base)
    with pytest.raises(MarkFileError, match=r"trace\.json"):
        open_tracing(base, key, base)
    with pytest.raises(MismatchError, match="another mark"):
        open_tracing(mark, key, MarkFile.load(GOLDEN / "mark-v1.json"))


def test_a_second_run_makes_only_what_is_missing(issued: Path) -> None:
    before = copy_of(issued, 0).stat().st_mtime_ns
    again = make(issued, "--licensee", GUILTY[0])
    refused(again, "too late")  # --set, once there is a tracing mark
    told = gradmark(
        "license", "--mark", issued / "base" / "mark.json", "--model", "golden.make:net", "--data", "digits",
        "--key", GOLDEN / "key-v1.json", "--out", issued / "copies", "--licensee", GUILTY[0], "--json",
    )  # fmt: skip
    assert told.code == 0, told.err
    assert told.json()["copies"][0] == json.loads((issued / "license.json").read_text())["copies"][0]
    assert copy_of(issued, 0).stat().st_mtime_ns == before


@pytest.mark.parametrize("access", ["white", "black"])
def test_the_golden_copy_is_traced_for_ever(access: Access) -> None:
    expected = json.loads((GOLDEN / "expected-trace-v1.json").read_text())
    base, mark = (MarkFile.load(GOLDEN / name) for name in ("mark-ensemble-v1.json", "trace-v1.json"))
    key, model = OwnerKey.load(GOLDEN / "key-v1.json"), net().eval()
    load_weights(model, GOLDEN / "golden-copy-v1.safetensors")
    pool, names = load_data("digits").test.batch(slice(0, CARRIERS)), [*OTHERS_V1, expected["licensee"]]
    found = trace(mark, base, key, ModuleSuspect(model), pool, names, access=access, queries=2 * QUERIES)
    old = expected[access]
    assert [one.licensee for one in found.named] == old["named"] == [expected["licensee"]]
    assert found.log10_p == pytest.approx(old["log10_p"], abs=0.05)
    assert (found.queries, found.trace) == (old["queries"], expected["mark"])
    bits = open_tracing(mark, key, base).codebook.table([expected["licensee"]])[0]
    assert bits.tolist() == expected["bits"]


@pytest.mark.parametrize("access", ["white", "black"])
def test_the_leaking_licensee_is_named(issued: Path, access: str) -> None:
    result = ask(issued, copy_of(issued, 1), "--access", access, "--queries", 4000, "--json")
    assert result.code == 0, result.out + result.err
    found = result.json()
    assert found["outcome"] == "named"
    assert [one["licensee"] for one in found["named"]] == ["initech"]
    assert found["named"][0]["log10_p"] <= -6
    assert found["licensees"] == len(OTHERS) + 2
    assert (found["queries"] > 0) == (access == "black")
    assert found["queries"] <= found["queries_allowed"] == (4000 if access == "black" else 0)
    assert not [name for name in (GUILTY[0], *OTHERS) if name in result.out]


def test_colluders_are_named_and_nobody_else(issued: Path) -> None:
    found = ask(issued, mixed(issued, "mixed.safetensors"), "--json").json()
    assert found["named"], "this pair was measured to be found"
    assert {one["licensee"] for one in found["named"]} <= set(GUILTY)


def test_the_base_is_inconclusive_and_an_unmarked_network_no_evidence(issued: Path) -> None:
    result = ask(issued, issued / "base" / "model.safetensors", "--json")
    assert result.code == 3
    assert result.json()["owned"]["outcome"] == "owned"
    torch.manual_seed(5)
    save_weights(net(), issued / "fresh.safetensors")
    result = ask(issued, issued / "fresh.safetensors", "--json")
    assert result.code == 1
    assert result.json()["named"] == []
    assert ask(issued, issued / "fresh.safetensors", "--alpha", "1e-60").code == 3


def test_ranking_and_report(issued: Path, tmp_path: Path) -> None:
    paths = ("--ranking", tmp_path / "all.csv", "--report", tmp_path / "trace.html")
    result = ask(issued, copy_of(issued, 0), *paths)
    assert result.code == 0, result.err
    assert "Globex GmbH" in result.out
    rows = list(csv.DictReader((tmp_path / "all.csv").read_text(encoding="utf-8").splitlines()))
    assert len(rows) == len(OTHERS) + 2
    assert (rows[0]["licensee"], rows[0]["named"]) == ("Globex GmbH", "1")
    assert [r["named"] for r in rows[1:]] == ["0"] * (len(rows) - 1)
    assert stat.S_IMODE((tmp_path / "all.csv").stat().st_mode) == 0o600
    page = (tmp_path / "trace.html").read_text(encoding="utf-8")
    assert "Globex GmbH" in page
    assert "initech" not in page
    assert "uninvolved" not in page


def test_bad_input_is_refused_in_one_message(issued: Path, tmp_path: Path) -> None:
    suspect = copy_of(issued, 0)
    refused(ask(issued, suspect, "--trace", tmp_path / "none.json"), "mark file")
    refused(ask(issued, suspect, "--trace", issued / "base" / "mark.json"), "trace.json")
    refused(ask(issued, suspect, "--alpha", 2), "alpha")
    refused(ask(issued, suspect, "--report", tmp_path / "x.txt"), "html")
    refused(make(issued), "--licensee")
    (tmp_path / "twice.txt").write_text("a\na\n")
    refused(ask(issued, suspect, "--licensees", tmp_path / "twice.txt"), "twice")
    (issued / "copies" / "taken").mkdir(exist_ok=True)
    assert gradmark(
        "license", "--mark", issued / "base" / "mark.json", "--model", "golden.make:net", "--data", "digits",
        "--key", GOLDEN / "key-v1.json", "--out", issued / "copies", "--licensee", "taken",
    ).code == 2  # fmt: skip
    refused(
        gradmark(
            "license", "--mark", issued / "base" / "mark.json", "--model", "golden.make:net", "--data",
            "digits", "--key", GOLDEN / "key-v1.json", "--out", tmp_path / "c", "--licensee", "x",
            "--weights", copy_of(issued, 0),
        ),
        "another model",
    )  # fmt: skip


def test_the_picture_shows_every_licensee(issued: Path) -> None:
    model = net().eval()
    load_weights(model, copy_of(issued, 0))
    base, key = MarkFile.load(issued / "base" / "mark.json"), OwnerKey.load(GOLDEN / "key-v1.json")
    mark, pool = MarkFile.load(issued / "base" / "trace.json"), load_data("digits").test.all()
    found = trace(mark, base, key, ModuleSuspect(model), pool, [*GUILTY, *OTHERS])
    assert "202 licensees" in all_licensees(found).alt
    report = trace_report(found, owner="Acme Ltd", suspect_name="leak", data_name="digits")
    assert report.label == "Named"
    with pytest.raises(UsageError):
        trace(mark, base, key, ModuleSuspect(model), pool, GUILTY, alpha=0.0)
