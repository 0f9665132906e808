"""Extraction: a student takes over the teacher's function, and the owner's model stays as it was."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from conformance import CLASSES, SPECS, inputs, network
from gradmark import catalog
from gradmark.attacks.distill import Distill, Knockoff
from gradmark.errors import AttackError
from gradmark.protocols import Thief


def other() -> nn.Module:
    return nn.Sequential(nn.Linear(20, 32), nn.Tanh(), nn.Linear(32, CLASSES))


def fresh() -> nn.Module:
    return nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, CLASSES))


def thief(**more: Any) -> Thief:
    x, labels = inputs("vector", 240, seed=0)
    surrogate = torch.randn(300, 20, generator=torch.Generator().manual_seed(3))
    given = {"fresh": fresh, "other": other, "surrogate": surrogate, "sibling": network("vector", 5)}
    return Thief(SPECS["vector"], x, labels, batch_size=40, lr=0.05, **{**given, **more})


class Teacher(nn.Module):
    """A linear network that counts and keeps what it is asked, and moves the wrong classes its own way."""

    def __init__(self, shown: str = "logits") -> None:
        super().__init__()
        draw = torch.randn(CLASSES, 20, generator=torch.Generator().manual_seed(2))
        self.weight, self.shown = nn.Parameter(draw), shown
        self.drop = nn.Dropout(0.9)
        self.asked: list[Tensor] = []

    def __deepcopy__(self, memo: Any) -> Teacher:
        twin = Teacher(self.shown)
        twin.asked = self.asked  # shared, so that the test sees the copy's questions
        return twin

    def forward(self, x: Tensor) -> Tensor:
        self.asked.append(x.detach().clone())
        logits = self.drop(x) @ self.weight.T
        return logits if self.shown == "logits" else logits.softmax(1)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def agreement(a: nn.Module, b: nn.Module) -> float:
    x = inputs("vector", 200, seed=9)[0]
    with torch.no_grad():
        return float((a.eval()(x).argmax(1) == b.eval()(x).argmax(1)).double().mean())


@pytest.mark.parametrize("name", ["distill", "hard-labels", "knockoff"])
@pytest.mark.parametrize("student", ["fresh", "other", "sibling"])
def test_a_student_learns_the_teacher(name: str, student: str) -> None:
    teacher = Teacher().train()
    learnt = catalog.attack(name, {"student": student}).run(teacher, thief(), generator())
    assert teacher.training
    assert not learnt.training
    assert agreement(learnt, teacher) > 0.6  # from the teacher's function alone: its labels are no one's
    kinds = {"fresh": nn.ReLU, "other": nn.Tanh, "sibling": nn.ReLU}
    assert any(isinstance(part, kinds[student]) for part in learnt.modules())


def test_soft_answers_teach_more_than_the_class() -> None:
    x = inputs("vector", 200, seed=9)[0]
    teacher = Teacher().eval()
    gaps = []
    for hard in (False, True):
        student = Distill(hard=hard).run(teacher, thief(), generator())
        with torch.no_grad():
            given, told = student(x).log_softmax(1), teacher(x).softmax(1)
        gaps.append(float(F.kl_div(given, told, reduction="batchmean")))
    assert gaps[0] < 0.5 * gaps[1]


def test_an_api_of_probabilities_serves_as_well() -> None:
    a, b = (Distill(epochs=3).run(Teacher(shown), thief(), generator()) for shown in ("logits", "probs"))
    for v, w in zip(a.parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(v, w, atol=1e-3, rtol=1e-3)


def test_the_teacher_sees_what_the_student_sees() -> None:
    given = thief(augment=lambda x, g: x + 100)
    teacher = Teacher().eval()
    Distill(epochs=1).run(teacher, given, generator())
    assert all(float(x.mean()) > 90 for x in teacher.asked)


@pytest.mark.parametrize(("settings", "count"), [({}, 300), ({"budget": 70}, 70), ({"share": 0.2}, 60)])
def test_knockoff_asks_within_its_budget(settings: dict[str, Any], count: int) -> None:
    """Each surrogate input once, without augmentation, however long the training."""
    given = thief(augment=lambda x, g: x + 100)
    teacher = Teacher().eval()
    Knockoff(epochs=2, **settings).run(teacher, given, generator())
    asked = torch.cat(teacher.asked)
    assert len(asked) == count == len(asked.unique(dim=0))
    assert given.surrogate is not None
    assert float(torch.cdist(asked, given.surrogate).min(1).values.max()) < 1e-2


def test_the_generator_decides_everything() -> None:
    runs = []
    for seed in (1, 1, 2):
        runs.append(Distill(epochs=1).run(Teacher(), thief(), generator(seed)).state_dict())
        torch.rand(3)
    assert all(torch.equal(runs[0][k], runs[1][k]) for k in runs[0])
    assert not torch.equal(runs[0]["0.weight"], runs[2]["0.weight"])


def test_the_sibling_is_copied() -> None:
    given = thief()
    assert given.sibling is not None
    before = {k: v.clone() for k, v in given.sibling.state_dict().items()}
    student = Distill(epochs=1, student="sibling", lr_factor=1e-6).run(Teacher(), given, generator())
    assert all(torch.equal(before[k], v) for k, v in given.sibling.state_dict().items())
    for key, value in student.state_dict().items():
        torch.testing.assert_close(value, before[key], atol=1e-2, rtol=0)


@pytest.mark.parametrize(
    ("settings", "lacks"),
    [
        ({}, "fresh"),
        ({"student": "other"}, "other"),
        ({"student": "sibling"}, "sibling"),
        ({"surrogate": True}, "surrogate"),
    ],
)
def test_a_thief_who_lacks_something_is_told(settings: dict[str, Any], lacks: str) -> None:
    poor = replace(thief(), **{lacks: None})
    with pytest.raises(AttackError, match=f"Thief.{lacks}"):
        Distill(**settings).run(Teacher(), poor, generator())


# --- several attacks in a row -----------------------------------------------------------------------------


def test_a_chain_runs_its_steps_in_order() -> None:
    chain = catalog.attack("finetune+prune", {"finetune": {"epochs": 1}, "prune": {"fraction": 0.7}})
    assert chain.name == "finetune+prune"
    model, given = network("vector"), thief()
    once = chain.run(model, given, generator())
    source = generator()
    tuned = catalog.attack("finetune", {"epochs": 1}).run(model, given, source)
    twice = catalog.attack("prune", {"fraction": 0.7}).run(tuned, given, source)
    assert all(torch.equal(v, twice.state_dict()[k]) for k, v in once.state_dict().items())
    other_way = catalog.attack("prune+finetune", {"finetune": {"epochs": 1}}).run(model, given, generator())
    assert bool((other_way.state_dict()["0.weight"] != 0).all())


def test_a_chain_names_what_it_doesnt_know() -> None:
    with pytest.raises(AttackError, match="epochs"):
        catalog.attack("finetune", {"epoch": 1})
    with pytest.raises(AttackError, match="finetune"):
        catalog.attack("finetune+prune", {"finetune": {"epoch": 1}})
    with pytest.raises(Exception, match="'prun'"):
        catalog.attack("finetune+prun")
    with pytest.raises(Exception, match="no step 'distill'"):
        catalog.attack("finetune+prune", {"distill": {}})
