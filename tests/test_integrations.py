"""Other people's loops train what the plain loop trains: same losses, same weights, same mark."""

from __future__ import annotations

import copy
import runpy
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from conformance import KEY, SPECS, inputs, network, scheme_for, white
from gradmark.embed import Marker
from gradmark.errors import ResumeError, UsageError
from gradmark.schemes.class_contrast import ClassContrast

pytestmark = pytest.mark.filterwarnings("ignore")  # the libraries' own
X, Y = inputs("vector", 256, seed=0)
BATCH, STEPS, LR = 32, 8, 0.05
PARTS = [(X[s : s + BATCH], Y[s : s + BATCH]) for s in range(0, 256, BATCH)]


def marker(**more: Any) -> Marker:
    return Marker(scheme_for("filter-gradient", "vector"), KEY, SPECS["vector"], every=2, **more)


class Named(nn.Module):
    """As Hugging Face's models take and give: inputs by name, a dictionary with the loss."""

    config = None

    def __init__(self) -> None:
        super().__init__()
        self.body = network("vector")

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        scores = self.body(pixel_values)
        if labels is None:
            return {"logits": scores}
        return {"loss": F.cross_entropy(scores, labels), "logits": scores}


def plain(
    model: nn.Module, mark: Marker, accumulate: int = 1, dtype: torch.dtype | None = None
) -> list[float]:
    """The loop of the README; several batches a step where told. Returns the losses of the batches."""
    optimizer, found = torch.optim.SGD(model.parameters(), LR), []
    for i, (x, y) in enumerate(PARTS):
        with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
            out = model(x)
            scores = out["logits"] if isinstance(out, dict) else out
            wanted = mark.soft_labels((x, y), 0.1) if mark.labels else y
            loss = F.cross_entropy(scores, wanted) + mark.penalty(model, (x, y))
        (loss / accumulate).backward()
        found.append(float(loss.detach()))
        if (i + 1) % accumulate == 0:
            optimizer.step()
            optimizer.zero_grad()
    return found


def same(one: nn.Module, other: nn.Module, tolerance: float = 1e-6) -> None:
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        assert torch.allclose(a, b, atol=tolerance, rtol=1e-4)


def rows() -> list[dict[str, Tensor]]:
    return [{"pixel_values": x, "labels": y} for x, y in zip(X, Y, strict=True)]


def arguments(folder: Path, accumulate: int, **more: Any) -> Any:
    from transformers import TrainingArguments

    given: dict[str, Any] = {"save_strategy": "no", "max_steps": STEPS // accumulate, **more}
    return TrainingArguments(
        str(folder), per_device_train_batch_size=BATCH, gradient_accumulation_steps=accumulate,
        learning_rate=LR, lr_scheduler_type="constant", optim="sgd", max_grad_norm=0.0, report_to=[],
        use_cpu=True, disable_tqdm=True, logging_steps=1, train_sampling_strategy="sequential", **given,
    )  # fmt: skip


def trainer(folder: Path, model: nn.Module, mark: Marker, accumulate: int = 1, **more: Any) -> Any:
    from gradmark.integrations.transformers import MarkedTrainer

    own = ("save_strategy", "save_steps", "max_steps", "label_smoothing_factor")
    ours = {name: more.pop(name) for name in own if name in more}
    return MarkedTrainer(
        model=model, args=arguments(folder, accumulate, **ours), train_dataset=rows(), marker=mark, **more
    )


def logged(found: Any) -> list[float]:
    return [row["loss"] for row in found.state.log_history if "loss" in row]


@pytest.mark.parametrize("accumulate", [1, 2, 4])
def test_the_trainer_is_the_plain_loop(tmp_path: Path, accumulate: int) -> None:
    one, other = Named(), Named()
    losses = plain(one, marker(), accumulate)
    found = trainer(tmp_path, other, marker(), accumulate)
    found.train()
    same(one, other)
    steps = torch.tensor(losses).reshape(-1, accumulate).mean(1)
    assert torch.allclose(torch.tensor(logged(found)), steps, atol=1e-3)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_loss_counted_over_all_batches_doesnt_multiply_the_penalty(tmp_path: Path, accumulate: int) -> None:
    """With ``compute_loss_func`` the Trainer doesn't divide by the accumulation steps."""

    def mean_of_all(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
        return F.cross_entropy(outputs["logits"], labels, reduction="sum") / num_items_in_batch

    one, other = Named(), Named()
    plain(one, marker(), accumulate)
    trainer(tmp_path, other, marker(), accumulate, compute_loss_func=mean_of_all).train()
    same(one, other)


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("counted", [False, True])
def test_the_trainer_has_keyed_labels(tmp_path: Path, accumulate: int, counted: bool) -> None:
    """Spread by its own smoothing, in the place of its own loss; however that is counted."""

    def mean_of_all(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
        return F.cross_entropy(outputs["logits"], labels, reduction="sum") / num_items_in_batch

    def keyed() -> Marker:
        return Marker(ClassContrast(bits=40), KEY, SPECS["vector"], every=2, keyed_labels="alone")

    one, other = Named(), Named()
    plain(one, keyed(), accumulate)
    more = {"compute_loss_func": mean_of_all} if counted else {}
    trainer(tmp_path, other, keyed(), accumulate, label_smoothing_factor=0.1, **more).train()
    same(one, other)
    with pytest.raises(UsageError, match="nothing for keyed labels to spread"):
        trainer(tmp_path, Named(), keyed()).train()


def test_the_trainer_leaves_evaluation_alone(tmp_path: Path) -> None:
    mark = marker()
    found = trainer(tmp_path, Named(), mark, eval_dataset=rows())
    before = copy.deepcopy(mark.state_dict()["numbers"])
    loss = found.evaluate()["eval_loss"]
    assert mark.state_dict()["numbers"] == before
    with torch.no_grad():
        assert loss == pytest.approx(float(F.cross_entropy(found.model(X)["logits"], Y)), rel=1e-4)


def test_the_trainer_resumes_with_the_markers_state(tmp_path: Path) -> None:
    whole, mark = Named(), marker()
    trainer(tmp_path / "a", whole, mark).train()
    trainer(tmp_path / "b", Named(), marker(), save_strategy="steps", save_steps=4, max_steps=4).train()
    assert (tmp_path / "b" / "checkpoint-4" / "gradmark.pt").exists()
    resumed, fresh = Named(), marker()
    trainer(tmp_path / "b", resumed, fresh).train(resume_from_checkpoint=True)
    same(whole, resumed)
    assert fresh.status() == mark.status()
    (tmp_path / "b" / "checkpoint-4" / "gradmark.pt").write_bytes(b"no state")
    with pytest.raises(ResumeError, match="start afresh"):
        trainer(tmp_path / "b", Named(), marker()).train(resume_from_checkpoint=True)


def test_the_trainer_says_what_the_batch_lacks(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="mark_input"):
        trainer(tmp_path, Named(), marker(), mark_input="frames").train()


def test_inputs_may_have_any_name(tmp_path: Path) -> None:
    class Second(Named):
        def forward(self, mask: Any = None, pixel_values: Any = None, labels: Any = None) -> Any:  # type: ignore[override]
            return super().forward(pixel_values, labels)

    one, other = Named(), Second()
    plain(one, marker())
    trainer(tmp_path, other, marker()).train()
    same(one, other)


@pytest.fixture
def accelerator() -> Iterator[Any]:
    from accelerate.state import AcceleratorState

    yield None
    AcceleratorState._reset_state(True)


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_accelerate_is_the_plain_loop(accelerator: Any, accumulate: int, precision: str) -> None:
    from accelerate import Accelerator

    from gradmark.integrations.accelerate import AccelerateMarker

    one, other = network("vector"), network("vector")
    losses = plain(one, marker(), accumulate, torch.bfloat16 if precision == "bf16" else None)
    run = Accelerator(mixed_precision=precision, gradient_accumulation_steps=accumulate, cpu=True)
    model, optimizer = run.prepare(other, torch.optim.SGD(other.parameters(), LR))
    mark, found = AccelerateMarker(run, marker()), []
    for x, y in PARTS:
        with run.accumulate(model):
            loss = F.cross_entropy(model(x), y) + mark.penalty(model, (x, y))
            run.backward(loss)
            found.append(float(loss.detach()))
            optimizer.step()
            optimizer.zero_grad()
    assert found == pytest.approx(losses, rel=1e-5 if precision == "no" else 2e-2)
    same(one, other, 1e-6 if precision == "no" else 2e-2)
    assert mark.marker.state_dict()["numbers"][:2] == [STEPS, STEPS // 2]


def test_accelerates_checkpoints_hold_the_marker(accelerator: Any, tmp_path: Path) -> None:
    from accelerate import Accelerator

    from gradmark.integrations.accelerate import AccelerateMarker

    run, mark = Accelerator(cpu=True), marker()
    model = run.prepare(network("vector"))
    held = AccelerateMarker(run, mark)
    for _ in range(3):
        held.penalty(model, PARTS[0])
    run.save_state(str(tmp_path / "here"))
    before = held.status()
    for _ in range(6):
        held.penalty(model, PARTS[1])
    assert held.status() != before
    run.load_state(str(tmp_path / "here"))
    assert held.status() == before


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_fabric_is_the_plain_loop(precision: str, tmp_path: Path) -> None:
    from lightning.fabric import Fabric

    from gradmark.integrations.fabric import FabricMarker

    half = precision != "32-true"
    one, other = network("vector"), network("vector")
    losses = plain(one, marker(), dtype=torch.bfloat16 if half else None)
    fabric = Fabric(accelerator="cpu", devices=1, precision=precision)
    model, optimizer = fabric.setup(other, torch.optim.SGD(other.parameters(), LR))
    mark, found = FabricMarker(fabric, marker()), []
    for x, y in PARTS:
        loss = F.cross_entropy(model(x), y) + mark.penalty(model, (x, y))
        optimizer.zero_grad()
        fabric.backward(loss)
        optimizer.step()
        found.append(float(loss.detach()))
    assert found == pytest.approx(losses, rel=2e-2 if half else 1e-6)
    same(one, other, 2e-2 if half else 1e-6)
    fabric.save(str(tmp_path / "state.ckpt"), {"marker": mark})
    fresh = FabricMarker(fabric, marker())
    fabric.load(str(tmp_path / "state.ckpt"), {"marker": fresh})
    assert fresh.status() == mark.status()


def lit(accumulate: int, mark: Marker, folder: Path, **more: Any) -> tuple[Any, Any, list[float]]:
    """A LightningModule that knows nothing of marks, its Trainer, and the losses that will be seen."""
    import lightning as L

    from gradmark.integrations.lightning import MarkCallback

    class Module(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = network("vector")

        def forward(self, x: Tensor) -> Tensor:
            self.log("asked", 1.0)
            return self.net(x)

        def training_step(self, batch: Any, i: int) -> Any:
            return {"loss": F.cross_entropy(self(batch[0]), batch[1])}

        def validation_step(self, batch: Any, i: int) -> None:
            assert not torch.is_grad_enabled()
            self(batch[0])

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), LR)

    class Watch(L.Callback):
        def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, i: int) -> None:
            seen.append(float(outputs["loss"]) * accumulate)

    seen: list[float] = []
    settings: dict[str, Any] = {"max_epochs": 1, "enable_checkpointing": False, **more}
    run = L.Trainer(
        accelerator="cpu", devices=1, accumulate_grad_batches=accumulate, logger=False,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=folder,
        callbacks=[MarkCallback(mark), Watch()], **settings,
    )  # fmt: skip
    return Module(), run, seen


@pytest.mark.parametrize("accumulate", [1, 2])
def test_lightning_is_the_plain_loop(tmp_path: Path, accumulate: int) -> None:
    one = network("vector")
    losses = plain(one, marker(), accumulate)
    module, run, seen = lit(accumulate, marker(), tmp_path)
    loader = torch.utils.data.DataLoader(PARTS, batch_size=None)
    run.fit(module, loader, loader)
    same(one, module.net)
    assert seen == pytest.approx(losses, rel=1e-5)
    assert "training_step" not in vars(module)


def test_lightnings_checkpoints_hold_the_marker(tmp_path: Path) -> None:
    mark, fresh = marker(), marker()
    loader = torch.utils.data.DataLoader(PARTS, batch_size=None)
    module, run, _ = lit(1, mark, tmp_path)
    run.fit(module, loader)
    run.save_checkpoint(tmp_path / "last.ckpt")
    module, run, _ = lit(1, fresh, tmp_path, max_epochs=1)
    run.fit(module, loader, ckpt_path=tmp_path / "last.ckpt")
    assert fresh.status() == mark.status()


def test_manual_optimisation_is_told_what_to_do(tmp_path: Path) -> None:
    module, run, _ = lit(1, marker(), tmp_path)
    module.automatic_optimization = False
    with pytest.raises(UsageError, match=r"marker\.penalty"):
        run.fit(module, torch.utils.data.DataLoader(PARTS, batch_size=None))


@pytest.mark.parametrize("seed", [0, 24, 27])
def test_adapters_get_the_gradient_of_the_weights_they_stand_for(seed: int) -> None:
    """dL/dB = scale dL/dW A^T, and the penalty's value is the plain network's; B begins at zero."""
    from peft import LoraConfig, get_peft_model

    whole = network("vector")
    base = copy.deepcopy(whole)
    torch.manual_seed(seed)
    model = get_peft_model(base, LoraConfig(r=4, lora_alpha=8, target_modules=["0", "2"]))
    values = []
    for net in (whole, model):
        penalty = marker(weight=3.0).penalty(net, PARTS[0])
        penalty.backward()
        values.append(penalty.item())
    assert values[0] == pytest.approx(values[1])
    for name in ("0", "2"):
        layer = model.base_model.model.get_submodule(name)
        expected = 2.0 * whole.get_submodule(name).weight.grad @ layer.lora_A["default"].weight.T
        assert torch.allclose(layer.lora_B["default"].weight.grad, expected, atol=1e-6)
        assert layer.base_layer.weight.grad is None


def test_a_merged_adapter_reads_the_same() -> None:
    from peft import LoraConfig, get_peft_model

    from gradmark.integrations.peft import merged

    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = LoraConfig(r=4, target_modules=["0", "2"], init_lora_weights=False)
        model = get_peft_model(network("vector"), config)
    shipped = merged(model)
    assert isinstance(shipped, nn.Sequential)
    assert torch.allclose(shipped(X[:9]), model(X[:9]), atol=1e-5)
    scheme = scheme_for("filter-gradient", "vector")
    mark = scheme.mark(KEY, SPECS["vector"])
    a, b = (scheme.read(mark, white(m), (X, Y), access="white", carriers=50).values for m in (shipped, model))
    assert torch.allclose(a, b, atol=1e-5)
    with pytest.raises(UsageError, match="PeftModel"):
        merged(network("vector"))


EXAMPLES = sorted(p.name for p in (Path(__file__).parent.parent / "examples").glob("*.py"))


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n in EXAMPLES if n != "common.py"])
def test_examples_run(
    root: Path, name: str, monkeypatch: pytest.MonkeyPatch, capsys: Any, accelerator: Any
) -> None:
    """One epoch, which is too few to be sure of the mark: that they run, and ask the owner's question."""
    monkeypatch.setattr(sys, "argv", [name, "1"])
    monkeypatch.syspath_prepend(str(root / "examples"))
    runpy.run_path(str(root / "examples" / name), run_name="__main__")
    assert "bits, log10 p" in capsys.readouterr().out
