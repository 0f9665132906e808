"""The networks of a benchmark: trained once, kept as ``networks/<task>-<kind>-<seed>.safetensors``.

Kinds: ``control`` (unmarked), a scheme's label (the same seed and schedule, marked), ``sibling`` (unmarked,
of another seed: the thief's own), and ``base`` where marks are put in afterwards. A file that lies there
is used; a ``.json`` beside it tells how it came about and must then fit.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import nn

from gradmark import catalog
from gradmark.bench.experiment import Experiment, find_experiment
from gradmark.bench.suite import Entry
from gradmark.embed import Marker, Progress, Recipe, train
from gradmark.errors import ResumeError
from gradmark.files import atomic_write
from gradmark.keys import OwnerKey
from gradmark.protocols import Scheme
from gradmark.suspects import ModuleSuspect, file_digest, load_weights, save_weights
from gradmark.views import viewed

Report = Callable[[Progress], None]
_CALIBRATED: dict[tuple[Any, ...], Scheme] = {}


@dataclass(frozen=True)
class Wanted:
    """One network: ``kind`` is base, control, sibling or marked (then by ``entry``)."""

    task: str
    kind: str
    seed: int
    entry: Entry | None = None

    @property
    def name(self) -> str:
        label = self.kind if self.entry is None else self.entry.shown
        return f"{self.task.replace(':', '_')}-{label}-{self.seed}"

    def first(self) -> Wanted | None:
        """The network that this one starts from, if any."""
        experiment = find_experiment(self.task)
        if experiment.pretrain is None or self.kind == "base":
            return None
        seed = experiment.sibling_seed(self.seed) if self.kind == "sibling" else self.seed
        return Wanted(self.task, "base", seed)


def owner_key(seed: int) -> OwnerKey:
    """The owner's key of a seed: throw-away, so that anybody can repeat the benchmark."""
    return OwnerKey.from_seed(seed, "benchmark")


def obtain(wanted: Wanted, folder: Path, report: Report = lambda _: None, device: str = "cpu") -> nn.Module:
    """The network in eval mode on ``device``, trained there now if it isn't in the folder yet.

    ResumeError where it is another one.
    """
    path = folder / f"{wanted.name}.safetensors"
    if not path.exists():
        _make(wanted, folder, path, report, device)
    experiment = find_experiment(wanted.task)
    model = experiment.untrained(wanted.seed)
    check(wanted, folder)
    load_weights(model, path)
    if not path.with_suffix(".json").exists():
        _describe(path, model, experiment, {"identity": None, "history": [], "seconds": 0.0})
        _bind(path)
    return model.to(device).eval()


def about(wanted: Wanted, folder: Path) -> dict[str, Any]:
    """What is known of a network that :func:`obtain` has returned: utility in percent, history, digest."""
    path = folder / f"{wanted.name}.safetensors"
    known: dict[str, Any] = json.loads(path.with_suffix(".json").read_text())
    digest = file_digest(path)
    if known.get("weights", digest) != digest:
        raise ResumeError(
            f"{path.name} isn't the network that the file beside it tells of", expected=known["weights"][:19],
            found=digest[:19], fix=f"Remove {path.with_suffix('.json').name}, and it is measured again",
        )  # fmt: skip
    return {**known, "digest": digest}


def _make(wanted: Wanted, folder: Path, path: Path, report: Report, device: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    experiment, start, first = find_experiment(wanted.task), time.perf_counter(), wanted.first()
    recipe, seed = _schedule(wanted, experiment)
    model = experiment.untrained(seed) if first is None else obtain(first, folder, report, device)
    model = model.to(device)
    history: list[dict[str, Any]] = []
    if wanted.kind != "sibling" or first is None:  # a sibling that another owner's base serves as
        checkpoint = folder / f".{wanted.name}.ckpt"
        history = train(
            model, experiment.data().to_train(), experiment.seeded(recipe, seed), task=experiment.task,
            marker=_marker(wanted, experiment, folder, resumed=checkpoint.exists()), stage=wanted.name,
            checkpoint=checkpoint, identity=json.dumps(_identity(wanted), sort_keys=True), report=report,
        )  # fmt: skip
        checkpoint.unlink(missing_ok=True)
    seconds = round(time.perf_counter() - start, 1)
    # first what tells how it came about: weights without it would count as given by somebody else
    _describe(
        path, model, experiment, {"identity": _identity(wanted), "history": history, "seconds": seconds}
    )
    save_weights(model, path)
    _bind(path)


def _schedule(wanted: Wanted, experiment: Experiment) -> tuple[Recipe, int]:
    """Recipe and training seed: what comes after a base sees its data in another order."""
    if experiment.pretrain is not None:
        if wanted.kind in ("base", "sibling"):
            return experiment.pretrain, wanted.seed
        return _changed(experiment, wanted), wanted.seed + 100
    return _changed(experiment, wanted), experiment.sibling_seed(
        wanted.seed
    ) if wanted.kind == "sibling" else wanted.seed


def _changed(experiment: Experiment, wanted: Wanted) -> Recipe:
    changes = {} if wanted.entry is None else dict(wanted.entry.marking(wanted.task).recipe)
    return Recipe(**{**asdict(experiment.recipe), **changes})


def _marker(wanted: Wanted, experiment: Experiment, folder: Path, *, resumed: bool) -> Marker | None:
    if wanted.entry is None:
        return None
    arguments = dict(wanted.entry.marking(wanted.task).marker)
    key = owner_key(wanted.seed)
    if not resumed:  # whose bits are the ones that were begun with
        (folder / f"{wanted.name}.mark.json").unlink(missing_ok=True)
    scheme = calibrated(wanted.entry, wanted.task, wanted.seed, key, folder)
    return Marker(scheme, key, experiment.data().spec, seed=wanted.seed, **arguments)


def calibrated(entry: Entry, task: str, seed: int, key: OwnerKey, folder: Path) -> Scheme:
    """The entry's scheme as ``key``'s holder would set it up, with the control's readings for reference.

    ``task``: as the suite names it, which needn't be what the task calls itself.
    """
    known, experiment = (entry.shown, task, seed, key.key_id, str(folder)), find_experiment(task)
    if known not in _CALIBRATED:
        scheme, data = entry.scheme(task), experiment.data()
        kept = folder / f"{Wanted(task, 'marked', seed, entry).name}.mark.json"
        owners = key.key_id == owner_key(seed).key_id
        if owners and kept.exists():
            scheme = catalog.scheme(entry.name, json.loads(kept.read_text()))
        elif hasattr(scheme, "calibrated"):
            if owners:
                _refuse_lost(kept)
            control = obtain(Wanted(task, "control", seed), folder)
            seen = ModuleSuspect(viewed(experiment.task, control))
            scheme = scheme.calibrated(key, data.spec, seen, experiment.carriers())
            if owners:  # the bits hang on its last digit, which another machine needn't compute alike
                atomic_write(kept, json.dumps(scheme.parameters()).encode(), overwrite=True)
        _CALIBRATED[known] = scheme
    return _CALIBRATED[known]


def _refuse_lost(kept: Path) -> None:
    """ResumeError where a network is there and the mark file with its bits isn't."""
    name = kept.name.removesuffix(".mark.json")
    if kept.with_name(f"{name}.safetensors").exists():
        raise ResumeError(
            f"The mark of {name} is lost", expected=kept.name, found="no such file beside the network",
            fix="Put it back, or remove the network",
        )  # fmt: skip


def _identity(wanted: Wanted) -> dict[str, Any]:
    """All that determines the network, but for the versions."""
    experiment = find_experiment(wanted.task)
    recipe, seed = _schedule(wanted, experiment)
    found: dict[str, Any] = {"recipe": {**asdict(recipe), "seed": seed}, "kind": wanted.kind}
    if wanted.entry is not None:
        scheme = wanted.entry.scheme(wanted.task)
        marker = dict(wanted.entry.marking(wanted.task).marker)
        # Whether bits are joint, as in older marks they aren't, is in the mark file that is kept.
        parameters = {name: value for name, value in scheme.parameters().items() if name != "joint"}
        found |= {"scheme": scheme.name, "parameters": parameters, "marker": marker}
    plain: dict[str, Any] = json.loads(json.dumps(found))
    return plain


def check(wanted: Wanted, folder: Path) -> None:
    """ResumeError where a network of that name lies there that was trained with other settings."""
    path = folder / f"{wanted.name}.safetensors"
    if not path.exists() or not path.with_suffix(".json").exists():
        return
    before = json.loads(path.with_suffix(".json").read_text()).get("identity")
    now = _identity(wanted)
    if before is not None:
        before["recipe"] = {**json.loads(json.dumps(asdict(Recipe()))), **before["recipe"]}
    if before is not None and before != now:
        differ = [f"{k}: {before.get(k)} then, {now.get(k)} now" for k in now if before.get(k) != now[k]]
        raise ResumeError(
            f"{path.name} was trained with other settings", found="; ".join(differ)[:500],
            fix="Name another --out, or remove the network",
        )  # fmt: skip


def _bind(path: Path) -> None:
    """Note beside the weights which ones they are."""
    known = json.loads(path.with_suffix(".json").read_text())
    text = json.dumps({**known, "weights": file_digest(path)}, indent=1)
    atomic_write(path.with_suffix(".json"), text.encode(), overwrite=True)


def _describe(path: Path, model: nn.Module, experiment: Experiment, row: dict[str, Any]) -> None:
    worth = experiment.task.utility(model)
    head = {"utility": worth.percent, "utility_n": worth.n, "utility_details": worth.details}
    text = json.dumps({**head, **row}, indent=1)
    atomic_write(path.with_suffix(".json"), text.encode(), overwrite=True)
