"""The benchmark: resumed exactly, summed up, and honest about what failed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from commandline import gradmark, refused
from gradmark import catalog
from gradmark.bench.attacks import Configured, select, standard
from gradmark.bench.cells import finished, removal
from gradmark.bench.experiment import BUILT_IN, blends, find_experiment
from gradmark.bench.run import run_suite
from gradmark.bench.store import Wanted, about
from gradmark.bench.suite import Entry, Suite, find_suite
from gradmark.bench.table import gather, markdown
from gradmark.embed import Recipe
from gradmark.embed.train import augmented, train
from gradmark.errors import DataError, ResumeError, UnknownNameError, UsageError
from gradmark.report.bench_plots import heatmap, pareto, thiefs_front
from gradmark.stats import fisher
from gradmark.tasks.speech import SpeechNet, speech_other
from tiny import net

FIELDS = {
    *("task", "scheme", "flagship", "attack", "parameters", "seed", "access", "versions", "removal"),
    *("utility_control", "utility_marked", "utility_after", "stealing_loss", "log10_p", "match", "n_bits"),
    *("queries", "seconds", "wrong_key_log10_p"),
}
TOML = """
tasks = ["benched:experiment"]
seeds = [3]
wrong_keys = 2
queries = 400
tune = 1
schemes = [{name = "filter-gradient", label = "ours", parameters = {bits = 16}}]
attacks = ["none", "finetune-lr1", "output-top1",
           {label = "half", name = "prune", parameters = {fraction = 0.5}},
           {label = "impossible", name = "finetune", parameters = {lr_factor = 1e30}}]
"""


def numbers(cells: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Cells without what the clock decides."""
    return [{k: v for k, v in cell.items() if "seconds" not in k} for cell in cells]


@pytest.fixture(scope="module")
def suite_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("suite") / "mine.toml"
    path.write_text(TOML)
    return path


@pytest.fixture(scope="module")
def ran(suite_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, dict[str, Any]]]:
    out = tmp_path_factory.mktemp("bench") / "out"
    result = gradmark("bench", suite_file, "--out", out, "--json")
    assert result.code == 0, result.err
    yield out, result.json()


def test_files_and_cells(ran: tuple[Path, dict[str, Any]]) -> None:
    out, told = ran
    cells = json.loads((out / "results.json").read_text())["cells"]
    assert told["cells"] == len(cells) == 9
    assert told["done"] == {"networks": 5, "units": 5, "units_in_all": 5}
    assert {Path(f).name for f in told["files"]} == {
        "results.json", "table.md", "pareto-benched_experiment.png", "heatmap-benched_experiment.png",
    }  # fmt: skip
    for name in told["files"]:
        assert Path(name).stat().st_size > 100
    for cell in cells:
        if "error" not in cell:
            assert cell.keys() >= FIELDS
            assert cell["stealing_loss"] == pytest.approx(cell["utility_marked"] - cell["utility_after"])
            assert len(cell["wrong_key_log10_p"]) == 2
            assert cell["removal"] == removal(cell)
            assert 0 <= cell["utility_after"] <= 100
    assert {c["access"] for c in cells if c["attack"] == "output-top1"} == {"black"}
    assert {c["n_bits"] for c in cells if "error" not in c} == {16}
    assert (out / "networks" / "benched_experiment-ours-3.safetensors").exists()


def test_an_ensembles_cells_tell_its_parts_apart(tmp_path: Path) -> None:
    suite = tmp_path / "parts.json"
    scheme = {"name": "filter-gradient,trigger,weights", "label": "three", "parameters": {"trigger.bits": 24}}
    given = {"tasks": ["benched:experiment"], "seeds": [3], "wrong_keys": 1, "queries": 400}
    suite.write_text(json.dumps({**given, "schemes": [scheme], "attacks": ["none"]}))
    assert gradmark("bench", suite, "--out", tmp_path / "out").code == 0
    white, black = json.loads((tmp_path / "out/cells/benched_experiment/three/none-3.json").read_text())
    for cell in (white, black):
        assert [part["scheme"] for part in cell["parts"]] == ["filter-gradient", "trigger", "weights"]
        read = [part for part in cell["parts"] if part["n"]]
        assert cell["log10_p"] == pytest.approx(fisher([part["log10_p"] for part in read]))
        assert sum(part["n_match"] for part in read) == round(cell["match"] * sum(p["n"] for p in read))
    assert white["parts"][2]["n"] > 0 == black["parts"][2]["n"]  # who asks an API reads no weights


def test_an_attack_that_fails_has_cells_with_its_error(ran: tuple[Path, dict[str, Any]]) -> None:
    out, told = ran
    assert {e["attack"] for e in told["errors"]} == {"impossible"}
    assert len(told["errors"]) == 2
    assert "impossible on ours:" in (out / "table.md").read_text()


def test_a_second_run_does_nothing_and_a_lost_cell_is_redone_alone(
    suite_file: Path, ran: tuple[Path, dict[str, Any]]
) -> None:
    out, _ = ran
    before = gather(out)
    times = {p: p.stat().st_mtime_ns for p in (out / "networks").iterdir()}
    again = gradmark("bench", suite_file, "--out", out, "--json").json()
    assert again["done"] == {"networks": 0, "units": 0, "units_in_all": 5}
    (out / "cells" / "benched_experiment" / "ours" / "finetune-lr1-3.json").unlink()
    once = gradmark("bench", suite_file, "--out", out, "--json").json()
    assert once["done"]["units"] == 1
    assert numbers(gather(out)) == numbers(before)
    assert {p: p.stat().st_mtime_ns for p in (out / "networks").iterdir()} == times


def test_only_and_fresh(suite_file: Path, ran: tuple[Path, dict[str, Any]]) -> None:
    out, _ = ran
    before = numbers(gather(out))
    for pattern, n in (("h*", 1), ("*/ours/none-3", 1)):
        done = gradmark("bench", suite_file, "--out", out, "--only", pattern, "--fresh", "--json").json()[
            "done"
        ]
        assert (done["units"], done["units_in_all"]) == (n, n)
    assert numbers(gather(out)) == before
    refused(gradmark("bench", suite_file, "--out", out, "--only", "nothing"), "matches")


def test_other_settings_are_noticed(
    suite_file: Path, ran: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    out, _ = ran
    other = tmp_path / "mine.toml"
    other.write_text(TOML.replace("bits = 16", "bits = 24"))
    refused(gradmark("bench", other, "--out", out, "--json"), "ours-3", "other settings")
    assert len(gather(out)) == 9
    network = out / "networks" / "benched_experiment-ours-3.safetensors"
    weights = network.read_bytes()
    network.write_bytes((out / "networks" / "benched_experiment-control-3.safetensors").read_bytes())
    assert gather(out) == [], "cells of a network that was replaced don't count"
    network.write_bytes(weights)
    changed = find_suite(str(suite_file)).units("half")[0]
    assert finished(changed, out)
    for other in ({"queries": 300}, {"wrong_keys": 1}):
        assert not finished(type(changed)(**{**vars(changed), **other}), out)
    noise = Configured("half", "noise", {"fraction": 0.5})
    assert not finished(type(changed)(**{**vars(changed), "attack": noise}), out)
    hurried = Configured("half", "prune", {"fraction": 0.5}, owners=True)
    assert not finished(type(changed)(**{**vars(changed), "attack": hurried}), out)
    stronger = Configured("half", "prune", {"fraction": 0.6})
    assert not finished(type(changed)(**{**vars(changed), "attack": stronger}), out)


@pytest.mark.parametrize("how", ["joblib", pytest.param("ray", marks=pytest.mark.slow)])
def test_workers_give_the_same_cells(
    how: str,
    suite_file: Path,
    ran: tuple[Path, dict[str, Any]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip(how)
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    out = tmp_path / "out"
    wanted = [c for c in gather(ran[0]) if c["attack"] in ("half", "output-top1")]
    (out / "networks").mkdir(parents=True)
    for path in (ran[0] / "networks").iterdir():
        (out / "networks" / path.name).write_bytes(path.read_bytes())
    options = {"ray": "local"} if how == "ray" else {"jobs": 2}
    suite = find_suite(str(suite_file))
    run_suite(suite, out, only="half", **options)  # type: ignore[arg-type]
    run_suite(suite, out, only="output-top1")
    assert numbers(gather(out)) == numbers(wanted)


def test_built_in_suites() -> None:
    quick = find_suite("digits-quick")
    assert len(quick.units()) == 6
    labels = [row.label for row in standard()]
    assert len(labels) == len(set(labels)) >= 60
    for name in ("digits", "speech", "cifar10"):
        assert find_suite(name).tasks == (name,)
    with pytest.raises(UnknownNameError, match="digits-quick"):
        find_suite("digit")


@pytest.mark.parametrize("row", standard(), ids=lambda row: row.label)
def test_every_attack_of_the_table_can_be_made(row: Configured) -> None:
    if row.name != "none":
        made = catalog.attack(row.name, dict(row.parameters))
        assert made.name == row.name


def test_black_only_and_white_only() -> None:
    assert Configured("a", "output-round").accesses("black") == ("black",)
    assert Configured("a", "distill+output-round").accesses("white") == ()
    assert Configured("a", "output-match+distill").accesses("black") == ("white", "black")
    assert Configured("a", "prune").accesses("black") == ("white", "black")
    assert Configured("a", "prune").accesses("white") == ("white",)


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("{", "no suite"),
        ('{"tasks": ["digits"], "colour": 1}', "colour"),
        ('{"seeds": [0]}', "tasks"),
        ('{"tasks": ["digits"], "attacks": ["finetun"]}', "labelled"),
        ('{"tasks": ["digits"], "attacks": [{"nom": "x"}]}', "makes no sense"),
        ('{"tasks": ["digits"], "seeds": []}', "empty"),
        ('{"tasks": ["digits"], "schemes": ["filter-gradient", "filter-gradient"]}', "unique"),
    ],
)
def test_bad_suites_are_refused(text: str, word: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.json"
    path.write_text(text)
    refused(gradmark("bench", path, "--out", tmp_path / "out", "--json"), word)
    assert not (tmp_path / "out").exists()


def test_unknown_names_are_refused_before_anything_is_trained(tmp_path: Path) -> None:
    path = tmp_path / "bad.json"
    for body in (
        {"tasks": ["digit"]},
        {"tasks": ["digits"], "schemes": ["filter"]},
        {"tasks": ["digits"], "attacks": [{"name": "finetun"}]},
        {"tasks": ["digits"], "attacks": [{"name": "finetune", "parameters": {"epoch": 1}}]},
    ):
        path.write_text(json.dumps({"attacks": ["none"], **body}))
        refused(gradmark("bench", path, "--out", tmp_path / "out"))
        assert not (tmp_path / "out").exists()


def test_tasks_without_their_data_say_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRADMARK_SHARED", str(tmp_path))
    monkeypatch.setenv("GRADMARK_CACHE", str(tmp_path))
    for name in ("speech", "cifar10"):
        with pytest.raises(DataError, match="GRADMARK_SHARED"):
            find_experiment(name).task.load()
    with pytest.raises(UsageError, match="no experiment"):
        find_experiment("tiny:net")


def test_speech(shared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRADMARK_SHARED", str(shared))
    task = find_experiment("speech")
    data, draw = task.data(), torch.Generator().manual_seed(0)
    x = task.surrogate(data, 5, draw)
    assert x.shape == (5, 8000)
    assert bool(data.spec.snap(x).equal(x))
    assert SpeechNet()(x).shape == speech_other()(x).shape == (5, 10)
    assert data.spec.domain == "signal"


@pytest.mark.parametrize("name", sorted(BUILT_IN))
def test_networks_of_two_architectures(name: str) -> None:
    task = find_experiment(name)
    one, same, other = task.untrained(0), task.untrained(0), task.other()
    assert one.state_dict().keys() != other.state_dict().keys()
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), same.parameters(), strict=True))


def test_blends_are_legal_inputs() -> None:
    data = find_experiment("digits").data()
    x = blends(data, 7, torch.Generator().manual_seed(1))
    assert x.shape == (7, *data.spec.input_shape)
    assert float(x.min()) >= 0
    assert float(x.max()) <= 1


def test_thiefs_front() -> None:
    assert thiefs_front([(3, -1), (0, -9), (1, -4), (2, -6), (1, -5)]) == [(0, -9), (1, -4), (3, -1)]


def test_pictures_and_table_of_many() -> None:
    cells = [
        {"task": "t", "scheme": s, "flagship": s == "b", "attack": a, "seed": seed, "access": "white",
         "utility_marked": 90.0, "utility_control": 91.0, "stealing_loss": loss, "log10_p": p + seed,
         "removal": p + seed > -6 and loss <= 5}
        for s, shift in (("a", 0), ("b", -5)) for seed in range(3)
        for a, loss, p in (("none", 0.0, -20.0 + shift), ("x", 2.0, -7.0 + shift), ("y", 80.0, -1.0))
    ]  # fmt: skip
    text = markdown(cells, "Many")
    assert "| none | -24.0 [-23.0] | +0.0 | -19.0 [-18.0] | +0.0 |" in text, "the flagship comes first"
    assert "**-6.0 [-5.0]**" in text
    assert "**0" not in text, "80 points are too high a price"
    for draw in (heatmap, pareto):
        assert draw(cells, "t", removed=-6, worth=5).svg_or_png.startswith(b"\x89PNG")
        with pytest.raises(UsageError):
            draw([], "t", removed=-6, worth=5)


def test_training_in_bfloat16_and_at_growing_sizes() -> None:
    data = find_experiment("digits").data()
    recipe = Recipe(epochs=2, precision="bfloat16", augment="shift", sizes=((1, 4), (1, 8)))
    x, _ = recipe.prepared(data.test.batch(slice(0, 4)), 0)
    assert x.shape[2:] == (4, 4)
    model = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(),
                                torch.nn.Linear(4, 10))  # fmt: skip
    assert len(train(model, data.to_train(), recipe)) == 2
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    for bad in ({"precision": "float16"}, {"sizes": ((1, 4),)}):
        with pytest.raises(UsageError):
            Recipe(epochs=2, **bad)  # type: ignore[arg-type]


def test_augmentation_by_a_generator_repeats_and_leaves_the_global_state_alone() -> None:
    batch = find_experiment("digits").data().test.batch(slice(0, 8))
    state = torch.get_rng_state()
    one, two = (augmented(batch, "shift-flip", torch.Generator().manual_seed(5))[0] for _ in range(2))
    assert torch.equal(one, two)
    assert torch.equal(state, torch.get_rng_state())


def test_units_of_a_suite_in_python() -> None:
    suite = Suite("s", ("digits",), (Entry("filter-gradient"),), select(["none"], standard()), (0, 1))
    assert [u.place for u in suite.units()] == [
        "digits/filter-gradient/none-0",
        "digits/filter-gradient/none-1",
    ]


def test_a_task_may_call_itself_as_it_likes(tmp_path: Path) -> None:
    path = tmp_path / "named.toml"
    path.write_text(TOML.replace("benched:experiment", "benched:renamed"))
    result = gradmark("bench", path, "--out", tmp_path / "out", "--only", "none", "--json")
    assert result.code == 0, result.err
    assert result.json()["done"]["units"] == 1


def test_weights_that_were_replaced_are_noticed(ran: tuple[Path, dict[str, Any]]) -> None:
    folder = ran[0] / "networks"
    wanted = Wanted("benched:experiment", "control", 3)
    path = folder / f"{wanted.name}.safetensors"
    weights = path.read_bytes()
    try:
        path.write_bytes((folder / "benched_experiment-ours-3.safetensors").read_bytes())
        with pytest.raises(ResumeError, match="isn't the network"):
            about(wanted, folder)
    finally:
        path.write_bytes(weights)


def test_attack_command(tmp_path: Path) -> None:
    from gradmark.suspects import load_weights, save_weights

    weights, out = tmp_path / "w.safetensors", tmp_path / "out"
    save_weights(net(), weights)
    common = ("attack", weights, "--data", "digits", "--model", "tiny:net", "--json")
    given = json.dumps({"prune": {"fraction": 0.9}})
    result = gradmark(*common, "--attack", "prune,quantize", "--parameters", given, "--out", out)
    assert result.code == 0, result.err
    told = result.json()
    assert [a["parameters"].get("fraction") for a in told["attacks"]] == [0.9, None]
    pruned = net()
    load_weights(pruned, out / "prune.safetensors")
    weights_left = torch.cat([p.flatten() for p in pruned.parameters() if p.ndim > 1])
    assert float((weights_left == 0).float().mean()) == pytest.approx(0.9, abs=0.01)
    refused(gradmark(*common, "--attack", "prune", "--out", out), "exists")
    new = tmp_path / "new"
    refused(gradmark(*common, "--attack", "prun", "--out", new), "prune")
    refused(gradmark(*common, "--attack", "prune", "--parameters", "[", "--out", new), "JSON")
    refused(gradmark(*common, "--attack", "prune", "--parameters", '{"part": 1}', "--out", new))
    refused(gradmark(*common, "--attack", "output-top1", "--out", new), "weights")
    assert not new.exists()
