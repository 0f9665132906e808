"""Embed and verify, end to end, through the command line."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import tiny
from commandline import Outcome, gradmark, refused
from conformance import SPECS
from gradmark import catalog
from gradmark.codec import MarkFile
from gradmark.commands.job import EmbedJob, fitting
from gradmark.endpoint import serve
from gradmark.ensemble import Ensemble
from gradmark.errors import OutputPathError, UsageError
from gradmark.files import private_folder
from gradmark.keys import OwnerKey
from gradmark.suspects import HttpSuspect, ModuleSuspect, load_weights

FAST = ("--model", "tiny:net", "--data", "digits", "--set", "step=0.1", "--bits", "32")


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Networks this small gain nothing from more, and lose much where the cores are busy."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def signed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with acme.key (unprotected) and out/, a small network that was signed well."""
    folder = tmp_path_factory.mktemp("signed")
    assert (
        gradmark(
            "keygen", "--owner", "Acme Ltd", "--out", folder / "acme.key", "--no-passphrase", "--seed", 5
        ).code
        == 0
    )
    result = gradmark(
        "embed",
        *FAST,
        "--key",
        folder / "acme.key",
        "--out",
        folder / "out",
        "--epochs",
        12,
        "--strength",
        1,
        "--json",
    )
    assert result.code == 0, result.err
    (folder / "embed.json").write_text(result.out)
    return folder


def ask(signed: Path, *more: object, suspect: object = None, data: str = "digits") -> Outcome:
    where = signed / "out"
    what = suspect or where / "model.safetensors"
    keys = ("--key", signed / "acme.key", "--mark", where / "mark.json")
    return gradmark("verify", what, *keys, "--data", data, *more)


def model_of(signed: Path) -> torch.nn.Module:
    model = tiny.net()
    load_weights(model, signed / "out" / "model.safetensors")
    return model.eval()


@contextmanager
def endpoint(model: torch.nn.Module, allowed: list[float]) -> Iterator[tuple[str, list[int]]]:
    """The model behind HTTP; fails with 500 once more than ``allowed[0]`` inputs were answered."""
    suspect, answered = ModuleSuspect(model), [0]

    def predict(x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        if answered[0] + len(x) > allowed[0]:
            raise RuntimeError("too busy")
        answered[0] += len(x)
        return suspect.query(torch.from_numpy(x)).softmax(1).numpy()

    with serve(predict) as url:
        yield url, answered


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """No pauses between attempts."""
    monkeypatch.setitem(HttpSuspect.__init__.__kwdefaults__, "sleep", lambda _: None)


def test_calibrated_the_model_is_as_confident_as_its_control(signed: Path) -> None:
    """A short fine-tune suffices to see it; accuracy and verdict don't hang on a temperature."""
    out = signed / "calibrated"
    result = gradmark(
        "embed", "--model", "tiny:net", "--weights", signed / "out" / "model.safetensors", "--data", "digits",
        "--key", signed / "acme.key", "--out", out, "--epochs", 1, "--calibrate", "--json",
    )  # fmt: skip
    assert result.code in (0, 1), result.err
    run = json.loads(result.out)
    assert run["temperature"] < 1, "smoothed labels had left it too modest"
    assert run["confidence"]["marked"] == pytest.approx(run["confidence"]["control"], abs=1e-3)


def test_how_the_mark_is_pushed_is_written_down(signed: Path) -> None:
    out = signed / "rehearsed"
    result = gradmark(
        "embed", "--model", "tiny:net", "--weights", signed / "out" / "model.safetensors", "--data", "digits",
        "--key", signed / "acme.key", "--out", out, "--epochs", 1, "--rehearse", 0.002, "--every", 2,
        "--soften", 0.3, "--keyed-labels", "beside", "--json",
    )  # fmt: skip
    assert result.code in (0, 1), result.err
    assert json.loads(result.out)["push"] == {
        "carriers": 32, "every": 2, "rehearse": 0.002, "soften": 0.3, "keyed_labels": "beside"
    }  # fmt: skip
    said = (out / "report.html").read_text()
    assert all(
        option in said
        for option in ("--every 2", "--rehearse 0.002", "--soften 0.3", "--keyed-labels beside")
    )


def test_keyed_labels_without_smoothing_are_refused_before_anything_is_trained(signed: Path) -> None:
    out = signed / "unsmoothed"
    result = gradmark(
        "embed", "--model", "tiny:net", "--data", "digits", "--key", signed / "acme.key", "--out", out,
        "--keyed-labels", "beside", "--smoothing", 0,
    )  # fmt: skip
    assert result.code == 2, result.err
    assert "Keyed labels spread what smoothing takes" in result.err
    assert not out.exists()


def test_embed_writes_what_the_contract_says(signed: Path) -> None:
    out = signed / "out"
    assert {p.name for p in out.iterdir()} == {
        *("model.safetensors", "control.safetensors", "mark.json", "run.json", "report.html")
    }
    run = json.loads((out / "run.json").read_text())
    assert run.items() <= json.loads((signed / "embed.json").read_text()).items()
    for value, low, high in run["accuracy"].values():
        assert 0 <= low <= value <= high <= 1
    assert run["accuracy"]["control"][0] > 0.85
    assert run["seed"] == 0 and run["versions"]["torch"] == torch.__version__
    assert run["verdict"]["outcome"] == "owned"
    assert run["control_verdict"]["outcome"] == "no-evidence"
    assert run["preflight"]["ok"] is True
    parts = run["scheme"]["parameters"]["parts"]
    assert tuple(part["scheme"] for part in parts) == catalog.FLAGSHIP_PARTS
    assert all(part["parameters"]["reference"] for part in parts[:2]), "calibrated by the control"
    assert parts[0]["parameters"]["bits"] == 32, "options are the first part's"
    assert (run["smoothing"], run["recipe"]["smoothing"]) == (0.1, 0.0), "the control's labels stay hard"
    assert run["target_log10_p"] == -15.0
    assert run["temperature"] == 1.0
    assert run["confidence"]["marked"] < run["confidence"]["control"], "smoothing costs confidence"
    mark = MarkFile.load(out / "mark.json")
    mark.check_key(OwnerKey.from_seed(5, "Acme Ltd"))
    assert mark.scheme_parameters == run["scheme"]["parameters"]
    secret = OwnerKey.load(signed / "acme.key").to_bytes(None).decode()
    for name in ("mark.json", "run.json", "report.html"):
        assert json.loads(secret)["secret"] not in (out / name).read_text()


def test_verify_white_box(signed: Path) -> None:
    result = ask(signed, "--model", "tiny:net", "--json")
    verdict = result.json()
    assert result.code == 0
    assert verdict["outcome"] == "owned" and verdict["access"] == "white" and verdict["queries"] == 0
    fields = {
        "outcome",
        "modified",
        "log10_p",
        "alpha",
        "test",
        "n_bits",
        "n_match",
        "ties",
        "match",
        "carriers",
    }
    fields |= {"queries", "access", "scheme", "mark", "suspect", "keys_tried", "seconds", "version"}
    assert fields <= set(verdict)


def test_verify_step_by_step(signed: Path, tmp_path: Path) -> None:
    page = tmp_path / "verdict.html"
    options = ("--model", "tiny:net", "--sequential", "--queries", "1500")
    result = ask(signed, *options, "--report", page, "--json")
    verdict = result.json()
    assert (result.code, verdict["test"], verdict["access"]) == (0, "betting", "black"), result.err
    assert verdict["log10_e"] >= 6 and verdict["log10_p"] == pytest.approx(-verdict["log10_e"])
    assert verdict["evidence"][-1] == [verdict["queries"], verdict["log10_e"]]
    text = page.read_text()
    assert "Bets on secret bits" in text and "What the bets" in text and "--sequential" in text
    assert "The number of queries was changed" not in text
    shown = ask(signed, *options)
    assert "log10 e = " in shown.out
    refused(ask(signed, *options, "--access", "white"), "read step by step")


def test_verify_pt2_and_report(signed: Path, tmp_path: Path) -> None:
    example = (torch.zeros(2, 1, 8, 8),)
    batch = torch.export.Dim("batch", min=1, max=4096)
    program = torch.export.export(model_of(signed), example, dynamic_shapes=({0: batch},))
    torch.export.save(program, tmp_path / "suspect.pt2")
    result = ask(signed, "--report", tmp_path / "verdict.html", suspect=tmp_path / "suspect.pt2")
    assert result.code == 0, result.err
    assert "MARK FOUND" in result.out
    assert "Acme Ltd" in (tmp_path / "verdict.html").read_text()


def test_verify_counts_the_keys_tried(signed: Path) -> None:
    once, often = (ask(signed, "--model", "tiny:net", "--keys-tried", n, "--json").json() for n in (1, 1000))
    assert often["log10_p"] == pytest.approx(once["log10_p"] + 3)


def test_an_innocent_and_a_strangers_key(signed: Path, tmp_path: Path) -> None:
    """Exit code 1 for a network that was never marked."""
    from gradmark.suspects import save_weights

    torch.manual_seed(0)
    save_weights(tiny.net(), tmp_path / "innocent.safetensors")
    result = ask(signed, "--model", "tiny:net", "--json", suspect=tmp_path / "innocent.safetensors")
    assert (result.code, result.json()["outcome"]) == (1, "no-evidence")


def test_too_few_bits_are_inconclusive(signed: Path) -> None:
    result = ask(signed, "--model", "tiny:net", "--alpha", 1e-90, "--json")
    assert (result.code, result.json()["outcome"]) == (3, "inconclusive")


def test_an_endpoint_that_fails_is_resumed_without_paying_twice(signed: Path, impatient: None) -> None:
    allowed = [500.0]
    with endpoint(model_of(signed), allowed) as (url, answered):
        first = ask(signed, suspect=url)
        refused(first, "kept failing", "asks nothing twice")
        paid = answered[0]
        assert 0 < paid <= 500
        allowed[0] = float("inf")
        second = ask(signed, "--json", suspect=url)
        assert second.code == 0, second.err
        verdict = second.json()
        assert verdict["access"] == "black" and 500 < verdict["queries"] <= 2000
        assert answered[0] <= verdict["queries"]
        assert verdict["reused"] == paid
    assert not kept_journals()


def kept_journals() -> list[Path]:
    """In the user's own folder, where nobody else can put answers."""
    return list((Path(os.environ["XDG_STATE_HOME"]) / "gradmark").glob("*.journal"))


def test_answers_that_somebody_planted_beside_the_mark_are_not_believed(
    signed: Path, impatient: None
) -> None:
    allowed = [500.0]
    with endpoint(model_of(signed), allowed) as (url, answered):
        refused(ask(signed, suspect=url), "kept failing")
        (journal,) = kept_journals()
        assert (journal.stat().st_mode & 0o777, journal.parent.stat().st_mode & 0o777) == (0o600, 0o700)
        planted = signed / "out" / journal.name
        shutil.move(journal, planted)
        allowed[0], answered[0] = float("inf"), 0
        verdict = ask(signed, "--json", suspect=url).json()
    assert answered[0] == verdict["queries"]
    assert verdict["reused"] == 0
    planted.unlink()


def test_only_a_place_of_ones_own_is_trusted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    assert private_folder() == tmp_path / "state" / "gradmark"
    (tmp_path / "state" / "gradmark").chmod(0o777)
    assert private_folder() is None, "others could write there"
    monkeypatch.setenv("XDG_STATE_HOME", "state")
    assert private_folder() == tmp_path / "home" / ".local" / "state" / "gradmark", "a relative path is none"
    monkeypatch.setenv("XDG_STATE_HOME", "/dev/null")
    assert private_folder() is None
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "gradmark").symlink_to(tmp_path / "state" / "gradmark")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "linked"))
    assert private_folder() is None, "a link may lead anywhere"


def test_where_there_is_no_such_place_nothing_is_promised(
    signed: Path, impatient: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", "/dev/null")
    with endpoint(model_of(signed), [500]) as (url, _):
        refused(result := ask(signed, suspect=url), "kept failing")
    assert "asks nothing twice" not in result.err


def test_a_journal_of_ones_own_is_kept(signed: Path, tmp_path: Path) -> None:
    with endpoint(model_of(signed), [float("inf")]) as (url, answered):
        one = ask(signed, "--journal", tmp_path / "j", "--queries", 300, "--json", suspect=url).json()
        paid = answered[0]
        two = ask(signed, "--journal", tmp_path / "j", "--queries", 300, "--json", suspect=url).json()
    assert answered[0] == paid
    assert one["log10_p"] == two["log10_p"]


def test_an_endpoint_of_another_api_is_bet_on_and_gone_on_with(signed: Path, tmp_path: Path) -> None:
    """Base64 PNGs in, class names out; what was asked for little evidence isn't asked again for more."""
    servers = pytest.importorskip("servers", reason="FastAPI is missing", exc_type=ImportError)
    model, names = ModuleSuspect(model_of(signed)), [str(i) for i in range(10)]
    app, seen = servers.image_app(lambda x: model.query(torch.from_numpy(x)).softmax(1).numpy(), names)
    (tmp_path / "api.toml").write_text(
        '[request]\ninputs = "instances"\nitem = "image.b64"\nencode = "png"\nbody = {model = "net"}\n'
        f'[response]\nscores = "predictions[*].by_name"\nclasses = {names}\n'
    )
    options = ("--api", tmp_path / "api.toml", "--sequential", "--journal", tmp_path / "j", "--json")
    with servers.running(app) as base:
        url = base + "/v1/classify"
        little = ask(signed, *options, "--queries", 16, suspect=url).json()
        requests = seen["requests"]
        more = ask(signed, *options, "--queries", 400, "--batch-size", 8, suspect=url)
        missing = ask(signed, *options, "--queries", 8, suspect=base + "/v1/nothing")
    assert little["queries"] == 16 and requests == 2
    verdict = more.json()
    assert more.code == 0 and 16 < verdict["queries"] < 400
    assert verdict["evidence"][0] == little["evidence"][0]
    asked = [json.loads(line)["input"] for line in (tmp_path / "j").read_text().splitlines()]
    assert len(asked) == len(set(asked)) == verdict["queries"]
    refused(missing, "status 404", "Check the address")


@pytest.mark.parametrize(
    ("answer", "words"), [(np.zeros((1, 3)), "wrong shape"), (np.full((64, 10), np.nan), "finite")]
)
def test_an_endpoint_that_answers_nonsense(
    signed: Path, answer: np.ndarray[Any, Any], words: str, impatient: None
) -> None:
    with serve(lambda x: answer) as url:
        refused(ask(signed, suspect=url), words)
    assert not kept_journals()


def test_an_endpoint_that_is_not_there(signed: Path, impatient: None) -> None:
    refused(ask(signed, suspect="http://127.0.0.1:9/predict"), "kept failing")
    refused(ask(signed, "--access", "white", suspect="http://127.0.0.1:9/predict"), "white-box")


def test_hostile_and_unfit_files(signed: Path, tmp_path: Path) -> None:
    model, key, mark = (("--model", "tiny:net"), signed / "acme.key", signed / "out" / "mark.json")
    cut = tmp_path / "cut.json"
    cut.write_bytes(mark.read_bytes()[:-20])
    bent = tmp_path / "bent.json"
    bent.write_text(mark.read_text().replace('"carriers":200', '"carriers":201'))
    short = tmp_path / "short.key"
    short.write_bytes(key.read_bytes()[:-9])
    weights = signed / "out" / "model.safetensors"
    data = ("--data", "digits")
    refused(gradmark("verify", weights, *model, *data, "--key", key, "--mark", cut), "mark file")
    refused(gradmark("verify", weights, *model, *data, "--key", key, "--mark", bent), "changed or damaged")
    refused(gradmark("verify", weights, *model, *data, "--key", short, "--mark", mark), "key file")
    other = tmp_path / "other.key"
    gradmark("keygen", "--owner", "Acme Ltd", "--out", other, "--no-passphrase")
    refused(gradmark("verify", weights, *model, *data, "--key", other, "--mark", mark), "doesn't belong")
    refused(gradmark("verify", weights, *data, "--key", key, "--mark", mark), "--model")
    refused(
        gradmark("verify", weights, "--model", "tiny:five_classes", *data, "--key", key, "--mark", mark),
        "doesn't fit",
    )
    pickled = tmp_path / "model.safetensors"
    torch.save(tiny.net(), pickled)
    refused(gradmark("verify", pickled, *model, *data, "--key", key, "--mark", mark), "pickle")
    np.savez(tmp_path / "colour.npz", x=np.zeros((20, 3, 8, 8), np.float32), y=np.arange(20) % 10)
    refused(ask(signed, *model, data=str(tmp_path / "colour.npz")), "shape")
    refused(ask(signed, *model, "--alpha", 2), "alpha")
    refused(ask(signed, *model, "--report", tmp_path / "a.txt"), ".html")


def test_nan_scores_are_refused(signed: Path, tmp_path: Path) -> None:
    from gradmark.suspects import save_weights

    save_weights(tiny.NanNet(), tmp_path / "nan.safetensors")
    refused(ask(signed, "--model", "tiny:NanNet", suspect=tmp_path / "nan.safetensors"), "finite")


def test_a_linear_mark(signed: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    arrays = {
        "directions": rng.normal(size=(40, 1, 8, 8)),
        "bits": rng.integers(0, 2, 40),
        "target_class": np.array(3),
    }
    np.savez(tmp_path / "mark.npz", **arrays)
    common = ("--linear-mark", tmp_path / "mark.npz", "--data", "digits", "--json")
    white = gradmark("verify", signed / "out" / "model.safetensors", "--model", "tiny:net", *common)
    assert (white.code, white.json()["outcome"], white.json()["n_bits"]) == (1, "no-evidence", 40)
    with endpoint(model_of(signed), [float("inf")]) as (url, answered):
        black = gradmark("verify", url, *common, "--report", tmp_path / "r.html")
    assert black.code == 1
    assert answered[0] <= black.json()["queries"] <= 2000
    assert "only if the arrays were fixed" in (tmp_path / "r.html").read_text()
    refused(gradmark("verify", "x.pt2", "--data", "digits"), "--linear-mark")


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ("tiny:five_classes", "10 classes or more"),
        ("tiny:colour", "fails on inputs"),
        ("tiny:NanNet", "finite"),
        ("tiny:frozen", "nothing to train"),
        ("tiny:broken", "no such weights"),
        ("tiny:nothing", "makes no model"),
        ("tiny:neet", "net"),
        ("nowhere", "MODULE:FACTORY"),
    ],
)
def test_embed_refuses_models_that_do_not_fit(signed: Path, tmp_path: Path, model: str, words: str) -> None:
    out = tmp_path / "out"
    result = gradmark(
        "embed", "--model", model, "--data", "digits", "--key", signed / "acme.key", "--out", out, "--json"
    )
    refused(result, words)
    assert not out.exists()


def test_embed_refuses_other_nonsense(signed: Path, tmp_path: Path) -> None:
    out, key = tmp_path / "out", ("--key", signed / "acme.key")
    np.savez(tmp_path / "xy.npz", **tiny.plain_arrays())
    pickled = tmp_path / "weights.pt"
    torch.save(tiny.net().state_dict(), pickled)
    for arguments, words in (
        ((*FAST, "--scheme", "filter-gradiant"), "Did you mean"),
        ((*FAST, "--set", "stepp=1"), "no such option"),
        ((*FAST, "--bits", 10**6), "fewer bits"),
        ((*FAST, "--target-p", 1.5), "target p"),
        ((*FAST, "--budget", 0), "strength"),
        ((*FAST, "--method", "magic"), "method"),
        ((*FAST, "--weights", pickled), "pickle"),
        ((*FAST, "--resume"), "nothing to resume"),
        (("--model", "tiny:net", "--data", tmp_path / "xy.npz"), "train"),
        (("--model", "tiny:net", "--data", tmp_path / "no.npz"), "no.npz"),
    ):
        refused(gradmark("embed", *arguments, *key, "--out", out), words)
        assert not out.exists()
    refused(gradmark("embed", *FAST, *key, "--out", signed / "out"), "exists already")
    refused(gradmark("embed", *FAST, *key, "--out", signed / "out", "--resume"), "finished")


def test_a_report_repeats_what_was_asked_for(tmp_path: Path) -> None:
    job = EmbedJob("tiny:net", "digits", OwnerKey.from_seed(5), tmp_path)
    assert job.other_options() == []
    asked = replace(job, target_p=1e-9, smoothing=0.0, calibrate=True, options=(("step", 0.1),))
    assert asked.other_options() == ["--target-p 1e-09", "--smoothing 0.0", "--calibrate", "--set step=0.1"]
    data, _ = fitting(asked)
    scheme = asked.scheme_value(data.spec)
    assert asked.marker(scheme, data, "exact").target_log10_p == pytest.approx(-9)
    assert job.marker(scheme, data, "exact").target_log10_p == Ensemble.target_log10_p


def test_hardened_is_a_word_for_several_options(tmp_path: Path) -> None:
    job = EmbedJob("tiny:net", "digits", OwnerKey.from_seed(5), tmp_path, hardened=True, lr=0.004)
    assert job.other_options() == ["--lr 0.004", "--hardened"]
    data, _ = fitting(job)
    scheme = job.scheme_value(data.spec)
    options = {f"trigger.{n}": v for n, v in (("bits", 128), ("pattern", "two-tone"))}
    assert scheme.parameters() == replace(
        job, hardened=False, options=tuple(options.items())
    ).scheme_value(data.spec).parameters()  # fmt: skip
    marker = job.marker(scheme, data, "exact")
    assert marker.rehearsal is not None
    assert (marker.rehearsal.rate, marker.soften) == (0.004, 0.3)
    gentler = replace(job, soften=0.1, rehearse=0.001, options=(("trigger.bits", 32),))
    marker = gentler.marker(gentler.scheme_value(data.spec), data, "exact")
    assert marker.rehearsal is not None
    assert (marker.rehearsal.rate, marker.soften, marker.parts[-1]) == (0.001, 0.1, 32)
    alone = replace(job, scheme="filter-gradient", optimizer="sgd")
    marker = alone.marker(alone.scheme_value(data.spec), data, "exact")
    assert marker.rehearsal is not None
    assert marker.rehearsal.rate == 0.002
    with pytest.raises(UsageError, match="--hardened is for class scores"):
        replace(job, task="faces")
    spoken = replace(data, spec=SPECS["mono"])
    assert "two-tone" not in str(job.scheme_value(spoken.spec).parameters())
    assert job.marker(job.scheme_value(spoken.spec), spoken, "exact").soften == 0


def test_nonsense_is_refused_before_anything_is_trained(
    signed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gradmark.commands.embed.train", None)
    for more, words in ((("--budget", 0), "strength"), (("--smoothing", 1), "smoothing")):
        out = tmp_path / "out"
        refused(gradmark("embed", *FAST, "--key", signed / "acme.key", "--out", out, *more), words)
        assert not out.exists()


def full(*_: object) -> None:
    raise OutputPathError("The output can't be written", found="No space left on device")


def test_embed_leaves_nothing_when_the_disk_is_full(
    signed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gradmark.commands.embed.save_weights", full)
    refused(
        gradmark("embed", *FAST, "--key", signed / "acme.key", "--out", tmp_path / "out", "--epochs", 1),
        "No space",
    )
    assert list(tmp_path.iterdir()) == []


def test_what_was_trained_outlives_a_failure_at_the_end(
    signed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ("embed", *FAST, "--key", signed / "acme.key", "--out", tmp_path / "out", "--epochs", 1)
    with monkeypatch.context() as broken:
        broken.setattr("gradmark.commands.embed._write", full)
        refused(gradmark(*command), "No space", "--resume goes on")
    assert not (tmp_path / "out" / "model.safetensors").exists()
    done = gradmark(*command, "--resume", "--json")
    assert done.code in (0, 1, 3), done.err
    assert (tmp_path / "out" / "model.safetensors").exists()
    assert not (tmp_path / "out" / ".work").exists()


def test_fine_tuning_from_weights_and_datasets_of_ones_own(signed: Path, tmp_path: Path) -> None:
    result = gradmark(
        "embed", "--model", "tiny:net", "--data", "tiny:datasets", "--key", signed / "acme.key",
        "--out", tmp_path / "out", "--weights", signed / "out" / "model.safetensors", "--epochs", 1, "--json",
    )  # fmt: skip
    assert result.code in (0, 1, 3), result.err
    recipe = result.json()["recipe"]
    assert recipe["lr"] < 2e-3 and recipe["epochs"] == 1


DRIVER = """
import importlib, signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where the tests run in the background
t = importlib.import_module("gradmark.embed.train")
from gradmark.cli import main
t._SAVE_SECONDS, save = 0.0, t._save
def slowly(*arguments):
    save(*arguments)
    time.sleep(0.05)
t._save = slowly
sys.argv = ["gradmark", *sys.argv[1:]]
main()
"""


def start(signed: Path, out: Path, *more: str) -> subprocess.Popen[str]:
    """``embed`` in a process of its own that saves after every step."""
    here = str(Path(__file__).parent)
    command = ["embed", *FAST, "--key", str(signed / "acme.key"), "--out", str(out), "--epochs", "3", *more]
    env = {**os.environ, "PYTHONPATH": here, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-c", DRIVER, *command], env=env, stderr=subprocess.PIPE, text=True, cwd=here
    )


def stop_at(process: subprocess.Popen[str], file: Path, how: signal.Signals) -> str:
    while process.poll() is None and not file.exists():
        time.sleep(0.01)
    time.sleep(0.3)
    running = process.poll() is None
    process.send_signal(how)
    told = process.communicate()[1]
    assert running, told
    return told


@pytest.mark.slow
def test_a_killed_run_resumes_to_the_same_bits(signed: Path, tmp_path: Path) -> None:
    whole, torn = tmp_path / "whole", tmp_path / "torn"
    process = start(signed, whole)
    assert process.communicate() and process.returncode in (0, 1, 3)
    stop_at(start(signed, torn), torn / ".work" / "marked.ckpt", signal.SIGKILL)
    assert not (torn / "model.safetensors").exists()
    copy = tmp_path / "copy"
    shutil.copytree(torn, copy)
    other = start(signed, copy, "--resume", "--seed", "1")
    assert "another configuration" in other.communicate()[1] and other.returncode == 2
    (copy / ".work" / "marked.ckpt").write_bytes(b"PK")
    damaged = start(signed, copy, "--resume")
    assert "can't be read" in damaged.communicate()[1] and damaged.returncode == 2
    resumed = start(signed, torn, "--resume")
    resumed.communicate()
    assert resumed.returncode == process.returncode
    assert (whole / "model.safetensors").read_bytes() == (torn / "model.safetensors").read_bytes()
    assert {p.name for p in torn.iterdir()} == {p.name for p in whole.iterdir()}


@pytest.mark.slow
def test_control_c_says_how_to_go_on(signed: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    process = start(signed, out)
    told = stop_at(process, out / ".work" / "control.ckpt", signal.SIGINT)
    assert process.returncode == 2
    assert told.strip().splitlines()[-1] == "gradmark: interrupted; continue with --resume"
    assert "Traceback" not in told
    resumed = start(signed, out, "--resume")
    resumed.communicate()
    assert resumed.returncode in (0, 1, 3)
    assert json.loads((out / "run.json").read_text())["resumed"] is True
