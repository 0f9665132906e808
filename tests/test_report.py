"""Reports: complete, self-contained, without secrets, and deaf to markup in names."""

from __future__ import annotations

import io
import math
import re
import sys
import xml.etree.ElementTree as ET
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.table import Table as RichTable

from gradmark.commands.summary import whose
from gradmark.errors import UsageError
from gradmark.protocols import Outcome, Reading, TestName, Verdict
from gradmark.report import (
    Figure,
    Report,
    Section,
    Table,
    embed_report,
    render_html,
    render_pdf,
    verdict_report,
    write_report,
)
from gradmark.report.verdict import modification
from gradmark.report.words import odds, probability
from gradmark.stats import run_test
from gradmark.terminal import show
from gradmark.verify import judge

HOSTILE = '<script>alert(1)</script>"\'&{{ 7*7 }} #panic("x") $\\frac$ *b* _i_ \u202eevil'
SVG = "{http://www.w3.org/2000/svg}"
XLINK = "{http://www.w3.org/1999/xlink}"


def reading(strength: float = 1.5, n: int = 64, queries: int = 0) -> Reading:
    generator = torch.Generator().manual_seed(3)
    bits = (torch.randint(0, 2, (n,), generator=generator) * 2 - 1).float()
    noise = torch.randn(n, generator=generator)
    counts = [q for q in (128, 256, 512) if q <= queries]
    history = tuple((q, strength * bits + noise * math.sqrt(512 / q)) for q in counts)
    access: Any = "black" if queries else "white"
    return Reading(strength * bits + noise, bits, 20, queries, access, history)


def verdict(
    outcome: Outcome = "owned", r: Reading | None = None, test: TestName = "signed-rank", **changes: Any
) -> Verdict:
    r = reading() if r is None else r
    t = run_test(test, (r.values * r.bits).numpy())
    result = Verdict(
        outcome, t.log10_p, 1e-6, test, len(r.bits), t.n_match, t.ties, t.n_match / t.n, r.carriers,
        r.queries, r.access, "filter-gradient", "sha256:" + "ab" * 32, "sha256:" + "cd" * 32, 1, 2.1,
        "0.1.0", reading=r,
    )  # fmt: skip
    return replace(result, **changes)


def report_of(v: Verdict, owner: str = "Acme Ltd", suspect: str = "net.onnx", **more: Any) -> Report:
    return verdict_report(v, owner=owner, suspect_name=suspect, data_name="digits", **more)


class Page(HTMLParser):
    """Tags with their attributes, and the text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def drawn(figure: Figure, gid: str) -> np.ndarray:
    """(n, 2) coordinates of what the group ``gid`` of an SVG draws: its markers, or its path."""
    (group,) = [g for g in ET.fromstring(figure.svg_or_png).iter(f"{SVG}g") if g.get("id") == gid]
    uses = [(float(u.get("x", 0)), float(u.get("y", 0))) for u in group.iter(f"{SVG}use")]
    if uses:
        return np.array(uses)
    path = next(p for p in group.iter(f"{SVG}path") if p.get("d"))
    return np.array(re.findall(r"[ML] (\S+) (\S+)", path.get("d", "")), dtype=float)


def assert_drawn(coordinates: np.ndarray, values: Any) -> None:
    """``coordinates`` (n,) are ``values`` (n,) but for an offset and a scale."""
    values = np.asarray(values, dtype=float)
    assert len(coordinates) == len(values)
    fit = np.polyval(np.polyfit(values, coordinates, 1), values)
    assert np.abs(fit - coordinates).max() < 0.01 * np.ptp(coordinates)


def text_of(pdf: bytes) -> str:
    pypdf = pytest.importorskip("pypdf")
    pages = pypdf.PdfReader(io.BytesIO(pdf)).pages
    return " ".join(" ".join(page.extract_text() for page in pages).split())


# --- HTML ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("outcome", ["owned", "no-evidence", "inconclusive"])
@pytest.mark.parametrize("linear", [False, True])
def test_every_outcome(outcome: Outcome, linear: bool) -> None:
    pytest.importorskip("matplotlib")
    report = report_of(verdict(outcome, reading(queries=512), reason="too few readings"), linear=linear)
    page = Page(render_html(report))
    assert report.question == "Does net.onnx carry the mark of Acme Ltd?"
    assert report.answer in page.text
    start = {"owned": "Yes:", "no-evidence": "No evidence", "inconclusive": "The test could not decide"}
    assert report.answer.startswith(start[outcome])
    assert ("valid only if the arrays were fixed before the suspect existed" in page.text) is linear
    assert ("OWNER.key" in page.text) is not linear
    assert "not a probability of guilt" in page.text


def test_page_is_self_contained() -> None:
    pytest.importorskip("matplotlib")
    html = render_html(report_of(verdict(r=reading(queries=512))))
    page = Page(html)
    assert not re.search(r"""(?:src|href|url|@import|srcset)\s*[=(]?\s*["']?\s*(?:https?:)?//""", html)
    links = [a[k] or "" for _, a in page.tags for k in ("src", "href") if k in a]
    assert links and all(link.startswith(("data:image/", "#")) for link in links)
    assert not {"script", "link", "iframe", "object"} & {tag for tag, _ in page.tags}
    ids = {a["id"] for _, a in page.tags if "id" in a}
    assert {link[1:] for link in links if link.startswith("#")} == ids
    images = [a for tag, a in page.tags if tag == "img"]
    assert len(images) == 2 and all(len(a["alt"] or "") > 40 for a in images)


def test_names_are_escaped() -> None:
    pytest.importorskip("matplotlib")
    tags = [tag for tag, _ in Page(render_html(report_of(verdict()))).tags]
    html = render_html(report_of(verdict(), owner=HOSTILE, suspect=HOSTILE))
    page = Page(html)
    assert [tag for tag, _ in page.tags] == tags
    assert "<script" not in html and "\u202e" not in html
    assert HOSTILE.replace("\u202e", "\ufffd") in page.text


def test_reports_hold_no_secret_order() -> None:
    """The plot of the readings is the same whatever the order of the bits, and whatever their signs."""
    pytest.importorskip("matplotlib")
    r = reading()
    order = torch.randperm(len(r.bits), generator=torch.Generator().manual_seed(0))
    other = replace(r, values=(r.values * r.bits)[order], bits=torch.ones_like(r.bits))
    assert plots().readings(r) == plots().readings(other)


def test_verdict_without_reading_needs_no_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert "Acme" in render_html(report_of(replace(verdict(), reading=None)))
    with pytest.raises(UsageError, match=r"pip install 'gradmark\[report\]'"):
        report_of(verdict())


def test_numbers_are_all_there() -> None:
    v = replace(verdict(), reading=None, keys_tried=7, modified=True, ties=2, n_match=50)
    section = next(s for s in report_of(v).sections if s.heading == "The numbers")
    cells = {row[0]: row[1] for row in section.tables[0].rows}
    assert cells["log10 p"] == f"{v.log10_p:.2f}"
    assert cells["Bits that match"].startswith("50 of 62")
    assert (cells["Keys tried"], cells["Changed since sealed"]) == ("7", "yes")
    assert (cells["Fingerprint of the mark"], cells["Fingerprint of the suspect"]) == (v.mark, v.suspect)


# --- PDF ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("outcome", ["owned", "no-evidence", "inconclusive"])
def test_pdf_holds_the_answer(outcome: Outcome) -> None:
    pytest.importorskip("typst")
    pytest.importorskip("matplotlib")
    report = report_of(verdict(outcome, reading(queries=512)), linear=outcome == "owned")
    pdf = render_pdf(report)
    assert pdf.startswith(b"%PDF")
    text = text_of(pdf)
    for word in re.findall(r"\w{4,}", report.answer):
        assert word in text
    assert "How to reproduce this" in text


def test_pdf_takes_no_markup() -> None:
    pytest.importorskip("typst")
    empty = Section(
        HOSTILE, (HOSTILE,), (Table((HOSTILE,), ((HOSTILE,),), HOSTILE, ("bad",)),), code=(HOSTILE,)
    )
    report = Report(HOSTILE, HOSTILE, HOSTILE, "none", (empty,), {HOSTILE: HOSTILE})
    text = text_of(render_pdf(report))
    assert text.count('#panic("x")') == 11
    assert "{{ 7*7 }}" in text and "*b* _i_" in text


def test_missing_typst(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "typst", None)
    with pytest.raises(UsageError, match=r"pip install 'gradmark\[report\]'"):
        write_report(report_of(replace(verdict(), reading=None)), tmp_path / "report.pdf")
    assert list(tmp_path.iterdir()) == []


def test_write_report(tmp_path: Path) -> None:
    report = report_of(replace(verdict(), reading=None))
    for _ in range(2):  # an existing report is replaced
        write_report(report, tmp_path / "r.HTML")
    assert (tmp_path / "r.HTML").read_text(encoding="utf-8") == render_html(report)
    with pytest.raises(UsageError, match=r"\*\.html or \*\.pdf"):
        write_report(report, tmp_path / "r.docx")


# --- plots --------------------------------------------------------------------------------------------------


def plots() -> Any:
    pytest.importorskip("matplotlib")
    from gradmark.report import plots

    return plots


def test_plot_of_readings_shows_every_value() -> None:
    r = reading(0.5)
    figure = plots().readings(r)
    products = np.sort((r.values * r.bits).numpy())[::-1]
    n_match = int((products > 0).sum())
    assert f"{n_match} are above zero" in figure.alt
    for gid, part in (("r0", products[:n_match]), (f"r{n_match}", products[n_match:])):
        tops = drawn(figure, gid)[1:-1:2, 1]  # corners come in pairs between the two ends on the zero line
        assert_drawn(tops[: len(part)], part)
    assert len(figure.svg_or_png) < 200_000
    assert figure == plots().readings(r)  # the same bytes again


def test_plot_of_evidence_shows_every_value() -> None:
    r = reading(queries=512)
    curve = plots().history_curve(r, "signed-rank", 3)
    assert [q for q, _ in curve] == [128, 256, 512]
    last = run_test("signed-rank", (r.values * r.bits).numpy()).log10_p
    assert curve[-1][1] == pytest.approx(last + math.log10(3))
    figure = plots().evidence_by_queries({"_key $x$ 名": curve, "other": [(1, -0.1), (600, -0.4)]}, 1e-6)
    points = drawn(figure, "curve-0")
    assert_drawn(points[:, 0], [q for q, _ in curve])
    assert_drawn(points[:, 1], [p for _, p in curve])
    assert_drawn(drawn(figure, "curve-1")[:, 1], [-0.1, -0.4])
    assert plots().history_curve(reading(), "sign") == []


def test_history_ends_where_the_verdict_does() -> None:
    r = replace(reading(queries=512), queries=600)
    assert plots().history_curve(r, "sign")[-1] == (600, run_test("sign", r.values * r.bits).log10_p)


def test_plot_of_pruning_shows_every_value() -> None:
    rows = [
        {"strength": s, "accuracy": 1 - s**3, "match": 0.95 - s / 9, "log10_p": -30 + 9 * s}
        for s in (0, 0.4, 0.9)
    ]
    figure = plots().accuracy_against_match(rows, 1e-6)
    for field, gid in (("accuracy", "accuracy"), ("match", "match"), ("log10_p", "evidence")):
        points = drawn(figure, gid)
        assert_drawn(points[:, 0], [row["strength"] for row in rows])
        assert_drawn(points[:, 1], [row[field] for row in rows])


def test_plot_of_attacks_shows_every_value() -> None:
    rows = [
        {"name": HOSTILE, "accuracy": 0.97, "log10_p": -30.0},
        {"name": "prune", "accuracy": 0.9, "log10_p": -3.0},
        {"name": "tune", "accuracy": 0.95, "log10_p": -20.0},
    ]
    figure = plots().attacks(rows, 0.98, 1e-6)
    assert_drawn(drawn(figure, "attack-accuracy")[:, 0], [0.97, 0.9, 0.95])
    assert_drawn(drawn(figure, "attack-mark-found")[:, 0], [-30, -20])
    assert len(drawn(figure, "attack-not-found")) == 1
    assert "prune: accuracy 90.0%, log10 p -3" in figure.alt


def test_plot_of_training_shows_every_value() -> None:
    marked = [
        {"step": s, "task_loss": 1 / s, "accuracy": 1 - 1 / s, "match": 0.9, "log10_p": -s} for s in (1, 5, 9)
    ]
    control = [{"step": s, "task_loss": 0.9 / s, "accuracy": 1 - 0.8 / s, "match": None} for s in (1, 5, 9)]
    figure = plots().training(marked, control)
    assert_drawn(drawn(figure, "training-log10_p-marked")[:, 1], [-1, -5, -9])
    assert_drawn(drawn(figure, "training-task_loss-control")[:, 1], [0.9 / s for s in (1, 5, 9)])
    assert len(drawn(figure, "training-match-marked")) == 3
    assert b"training-match-control" not in figure.svg_or_png
    with pytest.raises(UsageError, match="no training to draw"):
        plots().training([])


def test_plot_of_innocent_p_values_shows_every_value() -> None:
    p = np.random.default_rng(0).random(40)
    assert_drawn(drawn(plots().innocent_uniformity(p), "innocent")[::2, 0], np.sort(p))


@pytest.mark.parametrize("shape", [(8, 8), (1, 8, 8), (3, 8, 8), (50,), (2, 50), (12,)])
def test_directions_of_any_shape(shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(2, *shape, generator=generator)
    figure = plots().directions(x, torch.randn(2, 3, *shape, generator=generator))
    assert figure.kind == "png" and figure.svg_or_png.startswith(b"\x89PNG")
    assert "2 inputs, each with 3 secret directions" in figure.alt
    with pytest.raises(UsageError, match="don't fit"):
        plots().directions(x, torch.randn(2, *shape, generator=generator))


def test_plots_leave_global_settings_alone() -> None:
    mpl = pytest.importorskip("matplotlib")
    before = dict(mpl.rcParams)
    plots().readings(reading())
    assert dict(mpl.rcParams) == before


# --- embedding and words ------------------------------------------------------------------------------------

INFO: dict[str, Any] = {
    "owner": HOSTILE, "scheme": "filter-gradient", "parameters": {"bits": 64}, "epochs": 3, "seed": 5,
    "accuracy": {"marked": (0.971, 0.96, 0.98), "control": (0.974, 0.963, 0.982)},
    "seconds": 75.0, "budget": 0.5, "target_log10_p": -6.0, "options": ["--target-p 1e-06"],
}  # fmt: skip


def test_embed_report() -> None:
    pytest.importorskip("matplotlib")
    history = [{"step": 1, "task_loss": 1.0, "accuracy": 0.5, "match": 0.6, "log10_p": -1.0}]
    report = embed_report(INFO, verdict(), history, [{"step": 1, "task_loss": 1.0, "accuracy": 0.5}])
    page = Page(render_html(report))
    assert (
        report.answer.startswith("Yes:") and "0.3 points lower" in report.answer and "within" in report.answer
    )
    assert "97.1%" in page.text and "96.3% to 98.2%" in page.text and "--target-p 1e-06" in page.text


def test_embed_report_of_several_schemes() -> None:
    """Each part's parameters under its name; sealed numbers are long and tell a reader nothing."""
    pytest.importorskip("matplotlib")
    parts = [
        {"scheme": "filter-gradient", "parameters": {"bits": 64, "reference": "c2VhbGVk" * 30}},
        {"scheme": "class-contrast", "parameters": {"bits": 128, "reference": ""}},
    ]
    info = INFO | {"scheme": "ensemble", "parameters": {"parts": parts}}
    page = Page(render_html(embed_report(info, replace(verdict(), reading=None), [], [])))
    assert re.search(r"Parameter bits, filter-gradient\s*64\b", page.text)
    assert re.search(r"Parameter bits, class-contrast\s*128\b", page.text)
    assert "sealed, 240 characters" in page.text and "c2VhbGVk" not in page.text
    assert "--scheme ensemble" in page.text


@pytest.mark.parametrize(
    ("outcome", "change", "words"),
    [
        ("owned", {"target_log10_p": -99.0}, "In part:"),
        ("no-evidence", {}, "No:"),
        ("owned", {"budget": 0.1}, "over the budget of 0.1 points"),
        ("owned", {"accuracy": {"marked": (0.97, 0.96, 0.98), "control": None}}, "Without a control"),
    ],
)
def test_embed_report_admits_failure(outcome: Outcome, change: dict[str, Any], words: str) -> None:
    report = embed_report(INFO | change, replace(verdict(outcome), reading=None), [], [])
    assert words in report.answer
    assert words in Page(render_html(report)).text


def test_odds_never_overstate() -> None:
    for log10_p in (*np.linspace(-400, 0, 4001), -1.3, -2.0, -3.0, -6.0, math.log10(0.05)):
        text = odds(log10_p)
        raised = text.translate(str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹", "0123456789", ","))
        first, of = re.findall(r"(\d+) of (\d+)", raised)[0]
        of_log10 = float(of[2:]) if re.search(r"10[⁰¹²³⁴⁵⁶⁷⁸⁹]", text) else math.log10(int(of))
        assert math.log10(int(first)) - of_log10 >= log10_p - 1e-9
        assert probability(log10_p)
    assert odds(-18.2) == "fewer than 1 of 10¹⁸"
    assert odds(-18.0) == "fewer than 1 of 10¹⁷"
    assert odds(0.0) == "about 100 of 100"


def test_the_curve_of_several_parts_ends_where_the_verdict_stands() -> None:
    r = reading(queries=512)
    r = replace(r, parts=(len(r.values) // 2, len(r.values) - len(r.values) // 2))
    verdict = judge(
        r, "signed-rank", scheme="ensemble", mark="", suspect="", alpha=1e-6, keys_tried=3, seconds=0
    )
    assert plots().history_curve(r, "signed-rank", 3)[-1] == (512, pytest.approx(verdict.log10_p))


def test_of_a_program_that_came_with_its_file_a_verdict_speaks_of_the_weights() -> None:
    owned = replace(verdict(), outcome="owned", modified=False)
    assert whose(owned) == "OURS, UNTOUCHED since it was sealed."
    assert whose(replace(owned, own_program=True)).startswith("OURS, WEIGHTS UNTOUCHED")
    (section,) = modification(replace(owned, own_program=True))
    assert section.paragraphs[0].startswith("Not its weights.")


def test_tables_give_no_orders_to_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    table = RichTable("name", "found")
    table.add_row("\x1b[2J\x1b[Hm.safetensors: INTACT\x1b[8m", "\u202egnp")
    assert show(0, False, {}, table, "a\x1b]0;b\x07") == 0
    out = capsys.readouterr().out
    assert "INTACT" in out
    assert not set(out) & set("\x1b\u202e\x07")
