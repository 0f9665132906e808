"""The command line itself: keys, help, errors, and the README's own commands."""

from __future__ import annotations

import copy
import inspect
import json
import os
import re
import shlex
import shutil
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import gradmark as package
from commandline import gradmark, refused
from gradmark import catalog
from gradmark.cli import app
from gradmark.commands.job import SMOOTHING
from gradmark.commands.verify import parse_headers
from gradmark.endpoint import serve
from gradmark.errors import UsageError
from gradmark.keys import OwnerKey
from gradmark.suspects import ModuleSuspect, load_weights

COMMANDS = (
    *("keygen", "demo", "embed", "verify", "bench", "attack", "audit"),
    *("preflight", "license", "trace", "seal", "check"),
    *("claim", "judge"),
)


@pytest.mark.parametrize("name", COMMANDS)
def test_help_has_an_example(name: str) -> None:
    result = gradmark(name, "--help")
    assert result.code == 0
    text = " ".join(result.out.split())
    assert f"Example: gradmark {name}" in text
    for option in ("--json", "--seed"):
        assert option in text


def test_every_command_is_tested_here() -> None:
    assert tuple(sorted(c.callback.__name__ for c in app.registered_commands if c.callback)) == tuple(
        sorted(COMMANDS)
    )


def test_the_flagship_is_the_default() -> None:
    """The command line names it without importing the catalog."""
    (embed,) = (c.callback for c in app.registered_commands if c.callback and c.callback.__name__ == "embed")
    assert inspect.signature(embed).parameters["scheme"].default == catalog.FLAGSHIP
    assert inspect.signature(embed).parameters["smoothing"].default == SMOOTHING


def test_version() -> None:
    assert gradmark("--version").out.strip() == f"gradmark {package.__version__}"
    run = subprocess.run(
        [sys.executable, "-m", "gradmark", "--version"], capture_output=True, text=True, check=True
    )
    assert run.stdout.strip() == f"gradmark {package.__version__}"
    assert run.stderr == ""


def test_usage_errors_exit_with_two() -> None:
    for arguments in (("verify",), ("nonsense",), ("keygen", "--owner"), ("embed", "--epochs", "many")):
        result = gradmark(*arguments)
        assert result.code == 2
        assert result.out == "" and "Traceback" not in result.err


def test_keygen_protects_the_key(tmp_path: Path) -> None:
    key, secret = tmp_path / "acme.key", tmp_path / "pass"
    secret.write_text("correct horse\n")
    result = gradmark("keygen", "--owner", "Acme Ltd", "--out", key, "--passphrase-file", secret, "--json")
    made = result.json()
    assert result.code == 0 and made["protected"] is True
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    assert OwnerKey.load(key, "correct horse").key_id == made["key_id"]
    before = key.read_bytes()
    refused(
        gradmark("keygen", "--owner", "Acme Ltd", "--out", key, "--no-passphrase", "--json"),
        "never overwritten",
    )
    refused(
        gradmark("keygen", "--owner", "Acme Ltd", "--out", key, "--passphrase-file", secret),
        "never overwritten",
    )
    assert key.read_bytes() == before


def test_keygen_takes_the_passphrase_from_the_environment(tmp_path: Path) -> None:
    result = gradmark("keygen", "--owner", "A", "--out", tmp_path / "k", env={"GRADMARK_PASSPHRASE": "x"})
    assert result.code == 0 and "protected by your passphrase" in result.out
    assert OwnerKey.load(tmp_path / "k", "x").owner == "A"


def test_keygen_needs_a_passphrase_or_a_word(tmp_path: Path) -> None:
    refused(gradmark("keygen", "--owner", "A", "--out", tmp_path / "k"), "--no-passphrase")
    secret = tmp_path / "pass"
    secret.write_text("")
    refused(gradmark("keygen", "--owner", "A", "--out", tmp_path / "k", "--passphrase-file", secret), "empty")
    refused(
        gradmark("keygen", "--owner", "A", "--out", tmp_path / "k", "--passphrase-file", tmp_path / "no"),
        "read",
    )
    refused(gradmark("keygen", "--owner", "A\nB", "--out", tmp_path / "k", "--no-passphrase"), "name")
    refused(gradmark("keygen", "--owner", "A", "--out", tmp_path / "no" / "k", "--no-passphrase"), "written")
    assert not (tmp_path / "k").exists()


def test_a_wrong_passphrase(tmp_path: Path) -> None:
    key = tmp_path / "k"
    gradmark("keygen", "--owner", "A", "--out", key, env={"GRADMARK_PASSPHRASE": "right"})
    verify = ("verify", "x.pt2", "--key", key, "--mark", "m.json", "--data", "digits")
    result = gradmark(*verify, "--json", env={"GRADMARK_PASSPHRASE": "wrong"})
    refused(result, "wrong passphrase")
    assert result.json()["type"] == "PassphraseError"
    refused(gradmark(*verify), "--passphrase-file")


def test_the_attacks_are_listed_with_their_parameters() -> None:
    listed = {one["name"]: one for one in gradmark("attack", "--list", "--json").json()["attacks"]}
    assert listed.keys() == catalog.ATTACKS.keys()
    assert all(one["what"] and one["how"] for one in listed.values())
    assert listed["prune"]["parameters"]["fraction"] == catalog.attack("prune", {}).fraction
    assert "dark-noise" in gradmark("attack", "--list").out
    refused(gradmark("attack", "x.safetensors", "--attack", "prune"), "--list")


def test_a_bug_does_not_look_like_a_verdict(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object, **__: object) -> None:
        raise ZeroDivisionError("division by zero")

    monkeypatch.setattr("gradmark.commands.keygen.make_key", fails)
    result = gradmark("keygen", "--owner", "A", "--out", tmp_path / "k", "--no-passphrase", "--json")
    assert result.code == 2 and "unexpected ZeroDivisionError" in result.err and "Traceback" not in result.err
    assert result.json()["type"] == "ZeroDivisionError"


def blocks(root: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (root / "README.md").read_text(), re.DOTALL)


def test_the_readmes_training_loop(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(7200, 10)
    )
    names: dict[str, Any] = {"F": F, "model": model, "passphrase": "x"}
    names["batches"] = [(torch.rand(16, 3, 32, 32), torch.arange(16) % 10) for _ in range(3)]
    names["optimizer"] = torch.optim.SGD(model.parameters(), 0.01)
    names["unmarked"] = copy.deepcopy(model)
    for name in ("held", "test"):
        names[f"x_{name}"], names[f"y_{name}"] = torch.rand(20, 3, 32, 32), torch.arange(20) % 10
    (code,) = blocks(root, "python")
    exec(code, names)
    status, verdict = capsys.readouterr().out.splitlines()
    assert status.startswith("MarkStatus(") and verdict.startswith("no-evidence ")
    assert torch.isfinite(names["loss"])
    assert all(part.reference for part in names["scheme"].parts[:2])
    mark = package.MarkFile.load(tmp_path / "mark.json")
    mark.check_key(OwnerKey.load(tmp_path / "acme.key", "x"))


@pytest.mark.slow
def test_the_readmes_commands(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Word for word, but for the address of the endpoint."""
    from gradmark.demo import DigitsNet

    monkeypatch.chdir(tmp_path)
    lines = [
        line for block in blocks(root, "sh") for line in block.splitlines() if line.startswith("gradmark ")
    ]
    assert len(lines) == 10
    env: dict[str, str | None] = {"GRADMARK_PASSPHRASE": "x"}

    def run(line: str) -> None:
        result = gradmark(*shlex.split(line)[1:], env=env)
        assert result.code == 0, f"{line}: {result.out}{result.err}"

    for line in lines[:3]:
        run(line)
    model = DigitsNet()
    load_weights(model, tmp_path / "signed" / "model.safetensors")
    sizes = ({0: torch.export.Dim("batch", min=1, max=4096)},)
    exported = torch.export.export(
        model.eval(), (torch.zeros(2, 1, 8, 8),), dynamic_shapes={"input": sizes[0]}
    )
    torch.export.save(exported, tmp_path / "suspect.pt2")
    run(lines[3])
    assert (tmp_path / "verdict.html").stat().st_size > 10_000
    suspect = ModuleSuspect(model)
    run(lines[5])
    with serve(lambda x: suspect.query(torch.from_numpy(x)).softmax(1).numpy()) as url:
        for line in (lines[4], lines[6]):
            assert "http://127.0.0.1:8000/predict" in line
            run(line.replace("http://127.0.0.1:8000/predict", url))
    run(lines[7])
    shutil.copy(tmp_path / "copies" / "globex" / "model.safetensors", tmp_path / "leaked.safetensors")
    (tmp_path / "all.txt").write_text("Initech Ltd\nglobex\n")
    run(lines[8])
    run(lines[9])
    run_json = json.loads((tmp_path / "signed" / "run.json").read_text())
    assert run_json["verdict"]["log10_p"] < -12


def test_leaving_a_prompt_is_no_verdict(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Exit code 1 would say: no evidence."""
    import typer

    def leave(*_: Any) -> str:
        raise typer.Abort

    monkeypatch.setattr("gradmark.commands.keygen.open_key", leave)
    result = gradmark("verify", "x.pt2", "--key", "k", "--mark", "m", "--data", "digits", "--json")
    assert (result.code, result.json()["type"]) == (2, "Interrupted")


@pytest.mark.parametrize("name", COMMANDS)
def test_help_holds_no_pictures(name: str) -> None:
    shown = gradmark(name, "--help").out
    assert [c for c in shown if ord(c) > 0x2FFF] == []


def test_headers_that_http_forbids_are_refused_unshown(tmp_path: Path) -> None:
    for value in ("se\x00cret", "schlüssel"):
        path = tmp_path / "headers"
        path.write_text(f"Authorization: Bearer {value}")
        with pytest.raises(UsageError, match="printable ASCII") as caught:
            parse_headers([f"@{path}"])
        assert value not in str(caught.value)


@pytest.mark.parametrize("options", [(), ("--json",)])
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_result_that_nobody_can_read_is_no_verdict(tmp_path: Path, options: tuple[str, ...]) -> None:
    """Exit code 1 would say 'no evidence'."""
    command = [
        sys.executable,
        "-m",
        "gradmark",
        "keygen",
        "--owner",
        "A",
        "--no-passphrase",
        *options,
        "--out",
    ]
    with Path("/dev/full").open("w") as full:
        done = subprocess.run([*command, str(tmp_path / "a")], stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 2
    assert "standard output" in done.stderr
    assert "Traceback" not in done.stderr
    done = subprocess.run(
        ["sh", "-c", 'exec "$@" >&-', "sh", *command, str(tmp_path / "c")], stderr=subprocess.PIPE, text=True
    )
    assert (done.returncode, done.stderr) == (0, ""), "with no standard output at all the code tells all"
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run([*command, str(tmp_path / "b")], stdout=writing, stderr=subprocess.PIPE, text=True)
    os.close(writing)
    assert done.returncode == 2
