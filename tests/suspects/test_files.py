"""Files open, or are refused before anything in them can run."""

from __future__ import annotations

import io
import json
import os
import pickle
import sys
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from gradmark.errors import ModelError, ModelFileError, OutputPathError, UsageError
from gradmark.protocols import WhiteBox
from gradmark.suspects import (
    CallableSuspect,
    ModuleSuspect,
    file_digest,
    load_factory,
    load_weights,
    open_suspect,
    save_weights,
)
from gradmark.suspects.expressions import harmless

SOURCE = """
from torch import nn

def small():
    return nn.Sequential(nn.Flatten(), nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 3))

def large():
    return nn.Sequential(nn.Flatten(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3), nn.Linear(3, 3))

def needs(a):
    return a

def number():
    return 3
"""


def small() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return nn.Sequential(nn.Flatten(), nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 3))


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Linear(3, 3, bias=False)
        self.two = nn.Linear(3, 3, bias=False)
        self.two.weight = self.one.weight

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.two(self.one(x))
        return out


class Payload:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return os.mkdir, (str(self.path),)


X = torch.rand(5, 2, 3, generator=torch.Generator().manual_seed(4))


@pytest.fixture
def factory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "their_networks.py").write_text(SOURCE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "their_networks", raising=False)
    return "their_networks:small"


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("exported") / "model.pt2"
    program = torch.export.export(small().eval(), (X,), dynamic_shapes=({0: torch.export.Dim("b")},))
    torch.export.save(program, path)
    return path


def rewritten(
    source: Path, target: Path, change: Callable[[dict[str, bytes]], None], deflate: bool = False
) -> Path:
    """The archive with its records changed; names are without the root folder."""
    with zipfile.ZipFile(source) as archive:
        records = {name.partition("/")[2]: archive.read(name) for name in archive.namelist()}
    change(records)
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED if deflate else zipfile.ZIP_STORED) as archive:
        for name, content in records.items():
            archive.writestr(f"model/{name}", content)
    return target


def pickled(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def test_an_exported_file_is_a_white_box(exported: Path) -> None:
    suspect = open_suspect(exported)
    assert isinstance(suspect, WhiteBox) and suspect.name == "model.pt2"
    assert suspect.digest == file_digest(exported)
    own = ModuleSuspect(small())
    v = torch.ones(5, 3)
    torch.testing.assert_close(suspect.query(X), own.query(X))
    torch.testing.assert_close(suspect.vjp(X, v), own.vjp(X, v))
    assert suspect.query(X[:1]).shape == (1, 3)


def test_an_exported_file_in_any_architecture_opens(tmp_path: Path) -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv1d(2, 4, 3, padding=1), nn.BatchNorm1d(4)
            self.layer = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)
            self.register_buffer("scale", torch.ones(4), persistent=False)

        def forward(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            with torch.no_grad():
                mean = x.mean()
            h = self.layer(self.norm(self.conv(x - mean)).transpose(1, 2)) * self.scale
            tail = h[:, 1 - h.shape[1] :].sum(1)
            return torch.einsum("bi,bj->bj", tail, h.mean(1)), {"features": tail}

    module, x = Mixed().eval(), torch.rand(3, 2, 9)
    program = torch.export.export(
        module, (x,), dynamic_shapes=({0: torch.export.Dim("b"), 2: torch.export.Dim("l", min=4)},)
    )
    torch.export.save(program, tmp_path / "m.pt2")
    suspect = open_suspect(tmp_path / "m.pt2")
    torch.testing.assert_close(suspect.query(x), module(x)[0].detach())
    longer = torch.rand(2, 2, 12)
    torch.testing.assert_close(suspect.query(longer), module(longer)[0].detach())


def test_every_shared_network_opens_and_has_the_right_gradient(shared: Path) -> None:
    paths = sorted((shared / "networks").glob("*.pt2"))
    if not paths:
        pytest.skip("no shared networks here")
    for path in paths:
        suspect = open_suspect(path)
        assert isinstance(suspect, ModuleSuspect)
        shape = (1, 28, 28) if "mnist" in path.name or "fashion" in path.name else (3, 32, 32)
        generator = torch.Generator().manual_seed(5)
        x = torch.rand(1, *shape, generator=generator)
        v = torch.randn(1, 10, generator=generator)
        grad = suspect.vjp(x, v)
        assert suspect.query(x.repeat(3, 1, 1, 1)).shape == (3, 10)
        d = grad / grad.norm()  # the central difference along the gradient is its length
        h = 1e-3
        plus, minus = (suspect.query(x + s * h * d) for s in (1, -1))
        slope = ((plus - minus) * v).sum().item() / (2 * h)
        assert slope == pytest.approx(grad.norm().item(), rel=2e-2), path.name


PT2_ATTACKS: dict[str, Callable[[dict[str, bytes], bytes], None]] = {}


def attack(function: Callable[[dict[str, bytes], bytes], None]) -> Callable[[dict[str, bytes], bytes], None]:
    PT2_ATTACKS[function.__name__] = function
    return function


def edit(records: dict[str, bytes], name: str, change: Callable[[Any], None]) -> None:
    content = json.loads(records[name])
    change(content)
    records[name] = json.dumps(content).encode()


WEIGHTS, GRAPH = "data/weights/model_weights_config.json", "models/model.json"


@attack
def a_pickled_weight(records: dict[str, bytes], payload: bytes) -> None:
    records["data/weights/weight_0"] = payload
    edit(records, WEIGHTS, lambda c: next(iter(c["config"].values())).update(use_pickle=True))


@attack
def legacy_weights(records: dict[str, bytes], payload: bytes) -> None:
    records["data/weights/model.pt"] = payload


@attack
def legacy_constants(records: dict[str, bytes], payload: bytes) -> None:
    records["data/constants/model.pt"] = payload


@attack
def an_opaque_constant(records: dict[str, bytes], payload: bytes) -> None:
    entry = {"path_name": "opaque_obj_0", "is_param": False, "use_pickle": True, "tensor_meta": None}
    records["data/constants/opaque_obj_0"] = payload
    edit(records, "data/constants/model_constants_config.json", lambda c: c["config"].update(c=entry))


@attack
def another_model(records: dict[str, bytes], payload: bytes) -> None:
    records["models/other.json"] = records[GRAPH]


@attack
def compiled_code(records: dict[str, bytes], payload: bytes) -> None:
    records["data/aotinductor/model/model.so"] = b"\x7fELF"


@attack
def a_call_of_the_system(records: dict[str, bytes], payload: bytes) -> None:
    edit(records, GRAPH, lambda g: g["graph_module"]["graph"]["nodes"][0].update(target="torch.os.mkdir"))


@attack
def an_operator_on_files(records: dict[str, bytes], payload: bytes) -> None:
    target = "torch.ops.aten.from_file.default"
    edit(records, GRAPH, lambda g: g["graph_module"]["graph"]["nodes"][0].update(target=target))


@attack
def an_operator_that_unpickles(records: dict[str, bytes], payload: bytes) -> None:
    target = "torch.ops.debugprims.load_tensor.default"
    edit(records, GRAPH, lambda g: g["graph_module"]["graph"]["nodes"][0].update(target=target))


@attack
def an_expression_with_code(records: dict[str, bytes], payload: bytes) -> None:
    size = {"as_expr": {"expr_str": "__import__('os').mkdir('CANARY')", "hint": {"as_int": 4}}}

    def change(graph: Any) -> None:
        for value in graph["graph_module"]["graph"]["tensor_values"].values():
            value["sizes"] = [size]

    edit(records, GRAPH, change)


@attack
def a_name_with_code(records: dict[str, bytes], payload: bytes) -> None:
    def change(graph: Any) -> None:
        entry = graph["graph_module"]["module_call_graph"][0]
        entry["signature"]["forward_arg_names"] = ["x=__import__('os').mkdir('CANARY')"]

    edit(records, GRAPH, change)


@attack
def a_tree_of_a_foreign_type(records: dict[str, bytes], payload: bytes) -> None:
    spec = json.dumps([1, {"type": "collections.defaultdict", "context": "[]", "children_spec": []}])
    edit(
        records, GRAPH, lambda g: g["graph_module"]["module_call_graph"][0]["signature"].update(in_spec=spec)
    )


@pytest.mark.parametrize("name", PT2_ATTACKS)
def test_hostile_archives_are_refused_unopened(name: str, exported: Path, tmp_path: Path) -> None:
    canary = tmp_path / "CANARY"
    payload = pickled(Payload(canary))
    path = rewritten(exported, tmp_path / "m.pt2", lambda records: PT2_ATTACKS[name](records, payload))
    folder = Path.cwd()
    os.chdir(tmp_path)
    try:
        with pytest.raises(ModelFileError, match="isn't safe to open"):
            open_suspect(path)
    finally:
        os.chdir(folder)
    assert not canary.exists()


def test_sample_inputs_and_guards_are_ignored(exported: Path, tmp_path: Path) -> None:
    """torch would unpickle the ones and compile the others; the network doesn't need them."""
    canary = tmp_path / "CANARY"

    def change(records: dict[str, bytes]) -> None:
        records["data/sample_inputs/model.pt"] = pickled(Payload(canary))
        edit(records, GRAPH, lambda g: g.update(guards_code=[f"__import__('os').mkdir({str(canary)!r})"]))

    suspect = open_suspect(rewritten(exported, tmp_path / "m.pt2", change))
    assert suspect.query(X).shape == (5, 3)
    assert not canary.exists()


def test_compressed_and_crowded_archives_are_refused(exported: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match="compressed"):
        open_suspect(rewritten(exported, tmp_path / "m.pt2", lambda records: None, deflate=True))
    path = rewritten(exported, tmp_path / "n.pt2", lambda records: None)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("elsewhere/models/model.json", b"{}")
    with pytest.raises(ModelFileError, match="doubtful names"):
        open_suspect(path)


@pytest.mark.parametrize("ending", ["pt2", "pt", "pth", "bin", "ckpt", "pkl", "safetensors"])
@pytest.mark.parametrize("form", ["torch", "plain", "old"])
def test_pickles_are_refused_under_any_name(
    ending: str, form: str, tmp_path: Path, factory: str, record_property: Any
) -> None:
    path, canary = tmp_path / f"m.{ending}", tmp_path / "CANARY"
    if form == "torch":
        path.write_bytes(pickled({"a": Payload(canary)}))
    elif form == "plain":
        path.write_bytes(pickle.dumps(Payload(canary)))
    else:
        torch.save(Payload(canary), path, _use_new_zipfile_serialization=False)
    for model in (None, factory):
        with pytest.raises((ModelFileError, UsageError)) as caught:
            open_suspect(path, model=model)
        assert path.name in str(caught.value)
    record_property("refusal", str(caught.value))
    assert not canary.exists()


def test_a_pickled_state_dict_opens_with_its_architecture(tmp_path: Path, factory: str) -> None:
    for content in (small().state_dict(), {"state_dict": small().state_dict(), "epoch": 3}):
        torch.save(content, tmp_path / "m.pth")
        with pytest.raises(ModelFileError, match=r"is a pickle.*safetensors"):
            open_suspect(tmp_path / "m.pth")
        torch.testing.assert_close(
            open_suspect(tmp_path / "m.pth", model=factory).query(X), small()(X).detach()
        )
    torch.save([1, 2], tmp_path / "m.pth")
    with pytest.raises(ModelFileError, match="no state dict"):
        open_suspect(tmp_path / "m.pth", model=factory)


def test_weights_round_trip(tmp_path: Path, factory: str) -> None:
    path = tmp_path / "m.safetensors"
    save_weights(small(), path)
    suspect = open_suspect(str(path), model=factory)
    assert isinstance(suspect, WhiteBox) and suspect.digest == file_digest(path)
    torch.testing.assert_close(suspect.query(X), small()(X).detach())
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []
    with pytest.raises(UsageError, match="--model"):
        open_suspect(path)
    with pytest.raises(OutputPathError):
        save_weights(small(), tmp_path / "no" / "m.safetensors")


def test_tied_weights_round_trip(tmp_path: Path) -> None:
    path, tied, other = tmp_path / "m.safetensors", Tied(), Tied()
    save_weights(tied, path)
    load_weights(other, path)
    assert torch.equal(other.one.weight, tied.one.weight) and other.two.weight is other.one.weight
    save_file({"one.weight": torch.eye(3)}, path)  # as others save them: once
    load_weights(other, path)
    assert torch.equal(other.two.weight, torch.eye(3))


def test_what_does_not_fit_is_listed(tmp_path: Path, factory: str) -> None:
    path = tmp_path / "m.safetensors"
    save_weights(small(), path)
    with pytest.raises(
        ModelFileError, match=r"missing: 4\.weight, 4\.bias; shape: 1\.weight \(4, 6\) instead"
    ) as e:
        open_suspect(path, model="their_networks:large")
    assert "1.bias (4,) instead of (5,)" in str(e.value)
    save_file({f"t{i}": torch.zeros(1) for i in range(9)}, path)
    with pytest.raises(ModelFileError, match=r"unexpected: t0, t1, t2, t3, t4 and 4 more"):
        open_suspect(path, model=factory)


def test_broken_weights_are_refused(tmp_path: Path, factory: str, exported: Path) -> None:
    path = tmp_path / "m.safetensors"
    module = small()
    with torch.no_grad():
        module[1].weight[0, 0] = float("nan")  # type: ignore[index]
    save_weights(module, path)
    with pytest.raises(ModelError, match=r"aren't finite.*1\.weight"):
        open_suspect(path, model=factory)
    torch.export.save(torch.export.export(module, (X,)), tmp_path / "nan.pt2")
    with pytest.raises(ModelError, match="aren't finite"):
        open_suspect(tmp_path / "nan.pt2")


@pytest.mark.parametrize("ending", ["safetensors", "pt2", "onnx", "pt"])
def test_no_files_empty_files_and_folders(ending: str, tmp_path: Path) -> None:
    path = tmp_path / f"m.{ending}"
    with pytest.raises(ModelFileError, match="no file"):
        open_suspect(path)
    path.touch()
    with pytest.raises(ModelFileError, match="empty"):
        open_suspect(path)
    path.unlink()
    path.mkdir()
    with pytest.raises(ModelFileError, match="folder"):
        open_suspect(path)


@pytest.mark.parametrize("keep", [1, 8, 9, 100, 0.5, 0.99])
def test_truncated_files_are_refused(keep: float, exported: Path, tmp_path: Path, factory: str) -> None:
    save_weights(small(), tmp_path / "m.safetensors")
    (tmp_path / "m.pt2").write_bytes(exported.read_bytes())
    for path in (tmp_path / "m.safetensors", tmp_path / "m.pt2"):
        content = path.read_bytes()
        path.write_bytes(content[: int(keep if keep >= 1 else keep * len(content))])
        with pytest.raises(ModelFileError, match=r"damaged|can't be read|isn't safe"):
            open_suspect(path, model=factory)


@pytest.mark.parametrize(
    "content",
    [b"a text, not a model\n" * 9, b"\0" * 64, (2**62).to_bytes(8, "little") + b"{}" * 9, b"\xff" * 64],
)
def test_other_content_is_refused(content: bytes, tmp_path: Path, factory: str) -> None:
    for ending in ("safetensors", "pt2", "pt"):
        path = tmp_path / f"m.{ending}"
        path.write_bytes(content)
        with pytest.raises(ModelFileError, match=r"m\."):
            open_suspect(path, model=factory)
    with pytest.raises(ModelFileError, match=r"no known kind.*'\.txt'"):
        (tmp_path / "m.txt").write_text("x")
        open_suspect(tmp_path / "m.txt")


def test_damaged_archives_are_refused_with_our_error(exported: Path, tmp_path: Path) -> None:
    """Whatever byte of the graph or the tables is hit, the error is ours (or the damage does no harm)."""
    generator = torch.Generator().manual_seed(6)

    for number in range(40):

        def change(records: dict[str, bytes]) -> None:
            name = (GRAPH, WEIGHTS)[int(torch.randint(2, (), generator=generator))]
            content = bytearray(records[name])
            content[int(torch.randint(len(content), (), generator=generator))] = int(
                torch.randint(256, (), generator=generator)
            )
            records[name] = bytes(content)

        path = rewritten(exported, tmp_path / f"{number}.pt2", change)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                open_suspect(path).query(X)
        except (ModelFileError, ModelError):
            pass


def test_a_fixed_batch_is_filled_up(tmp_path: Path) -> None:
    model = small().eval()
    for size in (1, 3, 5):
        path = tmp_path / f"{size}.pt2"
        torch.export.save(torch.export.export(model, (X[:size],)), path)
        suspect = open_suspect(path)
        torch.testing.assert_close(suspect.query(X), model(X).detach())
        assert isinstance(suspect, ModuleSuspect)
        torch.testing.assert_close(
            suspect.vjp(X, torch.ones(5, 3)), open_suspect(model).vjp(X, torch.ones(5, 3))
        )


def test_few_bytes_for_many_numbers_are_refused(exported: Path, tmp_path: Path) -> None:
    """Strides of zero: a file of bytes that a look at its weights would make gigabytes of."""

    def change(records: dict[str, bytes]) -> None:
        def enlarge(body: Any) -> None:
            for meta in body["config"].values():
                meta["tensor_meta"]["sizes"] = [{"as_int": 2_000_000_000}, {"as_int": 4}]
                meta["tensor_meta"]["strides"] = [{"as_int": 0}, {"as_int": 1}]

        edit(records, "data/weights/model_weights_config.json", enlarge)

    with pytest.raises(ModelFileError, match="numbers"):
        open_suspect(rewritten(exported, tmp_path / "huge.pt2", change))


def test_two_suspects_of_one_instance_are_two(tmp_path: Path) -> None:
    one, two = small(), small()
    with torch.no_grad():
        two[1].weight.add_(1.0)
    for model, name in ((one, "one"), (two, "two")):
        save_weights(model, tmp_path / f"{name}.safetensors")
    shared: Any = small()
    first = open_suspect(tmp_path / "one.safetensors", model=shared)
    before = first.query(X)
    open_suspect(tmp_path / "two.safetensors", model=shared)
    assert torch.equal(first.query(X), before)


def test_live_objects_open() -> None:
    module = small()
    assert isinstance(open_suspect(module), ModuleSuspect)
    suspect = open_suspect(lambda x: x.flatten(1))
    assert isinstance(suspect, CallableSuspect)
    assert open_suspect(suspect) is suspect


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("their_networks", "MODULE:FACTORY"),
        (":small", "MODULE:FACTORY"),
        ("their_networks:", "MODULE:FACTORY"),
        ("no_such_module_here:small", "can't be imported"),
        ("their_networks:smal", "small"),
        ("their_networks:needs", "fails without arguments"),
        ("their_networks:number", "makes no model"),
    ],
)
def test_bad_factories_are_refused(name: str, words: str, tmp_path: Path, factory: str) -> None:
    save_weights(small(), tmp_path / "m.safetensors")
    with pytest.raises(UsageError, match=words):
        open_suspect(tmp_path / "m.safetensors", model=name)
    assert callable(load_factory(factory))


@pytest.mark.parametrize(
    "text",
    [
        "s77",
        "Symbol('s77', positive=True, integer=True)",
        "Mul(Integer(9), Symbol('s0', integer=True))",
        "2*s0 + 1",
        "FloorDiv(Symbol('u1'), Integer(2))",
        "Pow(s0, Integer(2))",
        "Float('0.5', precision=53)",
        "s0**-1",
        "Min(s0, 3)",
    ],
)
def test_sizes_are_accepted(text: str) -> None:
    assert harmless(text)


@pytest.mark.parametrize(
    "text",
    [
        "__import__('os')",
        "s0.__class__",
        "(lambda: 0)()",
        "9**9**9",
        "Pow(9, Pow(9, 9))",
        "f'{s0}'",
        "[s0]",
        "",
        "s0;s1",
        "Symbol('__import__')",
        "Symbol(*'a')",
        "open('x')",
        "Pow()",
        "Integer('9')",
        "s0 if s1 else s2",
        "1" * 30,
        "'a'",
        "s0**2**2**2**2**2**2",
        "LShift(1, 10**9)",
        "Symbol('s0', cls=open)",
        "(" * 300 + "1" + ")" * 300,
    ],
)
def test_other_expressions_are_not(text: str) -> None:
    assert not harmless(text)
