"""``gradmark demo``, once, for real."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from commandline import gradmark, refused


@pytest.mark.slow
def test_demo(tmp_path: Path) -> None:
    out = tmp_path / "demo"
    result = gradmark("demo", "--out", out, "--json")
    assert result.code == 0, result.out + result.err
    content = result.json()
    verdicts = {v["name"]: v for v in content["verdicts"]}
    for name in ("owner, white-box", "owner, black-box"):
        assert verdicts[name]["innocent"] is False
        assert verdicts[name]["outcome"] == "owned"
        assert verdicts[name]["log10_p"] <= -12
    assert 0 < verdicts["owner, black-box"]["queries"] <= 2000
    innocents = [v for v in content["verdicts"] if v["innocent"]]
    assert len(innocents) == 6
    assert {v["outcome"] for v in innocents} == {"no-evidence"}
    attacked = {v["attack"] for v in content["verdicts"] if v["attack"]}
    assert attacked == {"finetune", "prune", "quantize"}
    assert set(content["accuracy"]) == {"marked", "control"}
    assert min(content["accuracy"].values()) > 0.9
    report = Path(content["report"])
    page = report.read_text()
    assert report == out / "report.html"
    assert page.count("<img") >= 5 or page.count("data:image") >= 5
    assert not re.search(r"""(src|href)=["']https?:""", page)


def test_demo_spares_a_folder_with_other_things(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    refused(gradmark("demo", "--out", tmp_path), "other things")
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]
    refused(gradmark("demo", "--out", tmp_path / "thesis.txt"), "other things")
