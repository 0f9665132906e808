"""Names to classes: three explicit tables, and a hint for a misspelt name."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import fields
from typing import Any

from gradmark.attacks.adversarial import Adversarial
from gradmark.attacks.average import Average
from gradmark.attacks.dark_noise import DarkNoise
from gradmark.attacks.detect_probes import DetectProbes
from gradmark.attacks.distill import Distill, HardLabels, Knockoff
from gradmark.attacks.dummy import Dummy
from gradmark.attacks.fine_prune import FinePrune
from gradmark.attacks.finetune import FineTune
from gradmark.attacks.flatten import Flatten, SelfDistill, SubtractMean
from gradmark.attacks.flip import FlipSigns
from gradmark.attacks.fold import Fold
from gradmark.attacks.gradient_masking import GradientMasking
from gradmark.attacks.input_crop import InputCrop
from gradmark.attacks.input_depth import InputDepth
from gradmark.attacks.input_flip import InputFlip
from gradmark.attacks.input_jpeg import InputJpeg
from gradmark.attacks.input_noise import InputNoise
from gradmark.attacks.input_pca import InputPca
from gradmark.attacks.input_smooth import InputSmooth
from gradmark.attacks.input_squeeze import InputSqueeze
from gradmark.attacks.launder import Launder
from gradmark.attacks.lora import LoRA
from gradmark.attacks.noise import Noise
from gradmark.attacks.output_match import OutputMatch
from gradmark.attacks.output_noise import OutputNoise
from gradmark.attacks.output_round import OutputRound
from gradmark.attacks.output_temperature import OutputTemperature
from gradmark.attacks.output_top1 import OutputTop1
from gradmark.attacks.output_topk import OutputTopK
from gradmark.attacks.overwrite import Overwrite
from gradmark.attacks.permute import Permute
from gradmark.attacks.prune import Prune
from gradmark.attacks.quantize import Quantize
from gradmark.attacks.regularize import Regularize
from gradmark.attacks.rescale import Rescale
from gradmark.attacks.retrain import FineTuneLast, RetrainAll, RetrainLast
from gradmark.attacks.shift import Shift
from gradmark.attacks.smooth import Smooth
from gradmark.attacks.torchao import TorchAO
from gradmark.chain import Chain
from gradmark.ensemble import Ensemble
from gradmark.errors import AttackError, MarkFileError, UnknownNameError, UsageError
from gradmark.protocols import Attack, Scheme, Task
from gradmark.schemes.class_contrast import ClassContrast
from gradmark.schemes.feature_contrast import FeatureContrast
from gradmark.schemes.filter_gradient import FilterGradient
from gradmark.schemes.gradsigns import GradSigns
from gradmark.schemes.margin_trigger import MarginTrigger
from gradmark.schemes.path_weights import PathWeights
from gradmark.schemes.probe_gradient import ProbeGradient
from gradmark.schemes.trigger import Trigger
from gradmark.schemes.weights import Weights
from gradmark.suspects import load_factory
from gradmark.tasks.faces import Faces
from gradmark.tasks.language import Language
from gradmark.tasks.sentences import Sentences
from gradmark.tasks.speech import Speech
from gradmark.tasks.tabular import Tabular
from gradmark.tasks.transcription import Transcription

_LARGEST = 1_000_000  # of a scheme's numbers
FLAGSHIP = Ensemble.name
FLAGSHIP_PARTS = ("filter-gradient", "class-contrast", "trigger")
SCHEMES: dict[str, type[Any]] = {
    "filter-gradient": FilterGradient,
    "class-contrast": ClassContrast,
    "feature-contrast": FeatureContrast,
    "gradsigns": GradSigns,
    "margin-trigger": MarginTrigger,
    "path-weights": PathWeights,
    "probe-gradient": ProbeGradient,
    "trigger": Trigger,
    "weights": Weights,
}
ATTACKS: dict[str, Callable[..., Attack]] = {
    "finetune": FineTune,
    "adversarial": Adversarial,
    "dark-noise": DarkNoise,
    "fine-prune": FinePrune,
    "flatten": Flatten,
    "ftll": FineTuneLast,
    "gradient-masking": GradientMasking,
    "launder": Launder,
    "lora": LoRA,
    "overwrite": Overwrite,
    "regularize": Regularize,
    "rtal": RetrainAll,
    "rtll": RetrainLast,
    "self-distill": SelfDistill,
    "smooth": Smooth,
    "subtract-mean": SubtractMean,
    "prune": Prune,
    "quantize": Quantize,
    "average": Average,
    "dummy": Dummy,
    "flip-signs": FlipSigns,
    "fold": Fold,
    "noise": Noise,
    "permute": Permute,
    "rescale": Rescale,
    "torchao-int8": TorchAO,
    "weight-shift": Shift,
    "detect-probes": DetectProbes,
    "distill": Distill,
    "hard-labels": HardLabels,
    "knockoff": Knockoff,
    "input-crop": InputCrop,
    "input-depth": InputDepth,
    "input-flip": InputFlip,
    "input-jpeg": InputJpeg,
    "input-noise": InputNoise,
    "input-pca": InputPca,
    "input-smooth": InputSmooth,
    "input-squeeze": InputSqueeze,
    "output-match": OutputMatch,
    "output-noise": OutputNoise,
    "output-round": OutputRound,
    "output-temperature": OutputTemperature,
    "output-top1": OutputTop1,
    "output-topk": OutputTopK,
}
TASKS: dict[str, Callable[..., Task]] = {
    "faces": Faces,
    "language": Language,
    "sentences": Sentences,
    "speech": Speech,
    "tabular": Tabular,
    "transcription": Transcription,
}


def task(name: str) -> Task:
    """The task called ``name``, or the one that ``MODULE:FACTORY`` returns. UnknownNameError, UsageError."""
    if ":" not in name:
        return TASKS[_known(name, TASKS, "task")]()
    found = load_factory(name)()
    if not isinstance(found, Task):
        raise UsageError(
            f"{name} makes no task",
            expected="name, data, network, scores, carriers, loss and utility",
            found=type(found).__name__,
        )
    return found


def scheme(name: str, parameters: dict[str, Any] | None = None) -> Scheme:
    """The scheme called ``name``, or ``"a,b"`` for several under one key with all their defaults.

    Raises UnknownNameError, MarkFileError on unknown parameters.
    """
    given = dict(parameters or {})
    if name == Ensemble.name or "," in name:
        return _ensemble(name, given)
    kind = SCHEMES[_known(name, SCHEMES, "scheme", (FLAGSHIP,))]
    try:
        made: Scheme = kind(**_sane(kind, given))
        return made
    except (TypeError, ValueError, OverflowError) as cause:
        raise MarkFileError(
            f"This version can't take the parameters of scheme {name}",
            expected=", ".join(f"{f.name} ({f.type})" for f in fields(kind)),
            found=", ".join(f"{option}={str(value)[:40]}" for option, value in given.items()),
            fix="Correct them; if another version of gradmark wrote them, take that one",
        ) from cause


def _sane(kind: type[Any], given: dict[str, Any]) -> dict[str, Any]:
    """``given``, or a TypeError or ValueError where a number or text isn't one that arithmetic can take."""
    for name, value in given.items():
        declared = kind.__dataclass_fields__[name].type if name in kind.__dataclass_fields__ else ""
        types = {"int": (int,), "float": (int, float), "str": (str,)}.get(declared, (object,))
        if not isinstance(value, types) or (isinstance(value, bool) and object not in types):
            raise TypeError(name)
        if isinstance(value, int | float) and not abs(value) <= _LARGEST:
            raise ValueError(name)
    return given


def _ensemble(name: str, given: dict[str, Any]) -> Ensemble:
    """``parts`` as in a mark file; without them the names' defaults, where ``ensemble`` stands for the
    flagship's parts. Other parameters are the first part's, or, as ``PART.OPTION``, that part's."""
    joint: object = True
    if (rows := given.pop("parts", None)) is not None:  # as a mark file has it
        joint = given.pop("joint", False)
    else:
        said = [n.strip() for n in name.split(",")]
        names = [part for n in said for part in (FLAGSHIP_PARTS if n == Ensemble.name else (n,))]
        own: dict[str, dict[str, Any]] = {_known(n, SCHEMES, "scheme"): {} for n in names}
        for option, value in given.items():
            part, _, inner = option.rpartition(".")
            own[_known(part, own, "part of the mark") if part else names[0]][inner] = value
        rows = [{"scheme": n, "parameters": own[n]} for n in names]
        given = {}
    if (
        given
        or not isinstance(joint, bool)
        or not isinstance(rows, list | tuple)
        or not all(_is_part(row) for row in rows)
    ):
        raise MarkFileError(
            "The parts of the ensemble make no sense",
            expected="a list of {scheme, parameters}, and whether their bits are joint",
            found=str(rows)[:80],
            fix="Take the mark file that embed wrote",
        )
    return Ensemble(tuple(scheme(row["scheme"], row["parameters"]) for row in rows), joint)


def _is_part(row: object) -> bool:
    return (
        isinstance(row, dict)
        and row.keys() == {"scheme", "parameters"}
        and isinstance(row["scheme"], str)
        and row["scheme"] in SCHEMES
        and isinstance(row["parameters"], dict)
    )


def attack(name: str, parameters: dict[str, Any] | None = None) -> Attack:
    """The attack called ``name``, or several one after the other: ``finetune+prune``.

    ``parameters``: the attack's own; of several, those of each by its name, as in
    ``{"finetune": {"epochs": 2}}``. Raises UnknownNameError, AttackError on unknown parameters.
    """
    given = parameters or {}
    if "+" not in name:
        return _attack(name, given)
    steps = name.split("+")
    for stranger in set(given) - set(steps):
        raise UnknownNameError(f"{name} has no step {stranger!r}", expected=f"one of {', '.join(steps)}")
    return Chain(tuple(_attack(step, given.get(step, {})) for step in steps))


def _attack(name: str, parameters: dict[str, Any]) -> Attack:
    kind = ATTACKS[_known(name, ATTACKS, "attack")]
    try:
        return kind(**parameters)
    except TypeError as cause:
        known = ", ".join(getattr(kind, "__dataclass_fields__", ()))
        raise AttackError(
            f"The attack {name} has other parameters", expected=known or "none", found=", ".join(parameters)
        ) from cause


def _known(name: str, table: dict[str, Any], what: str, also: tuple[str, ...] = ()) -> str:
    """``name``, or UnknownNameError that tells those of ``table``, and ``also``."""
    if name in table:
        return name
    known = (*also, *table)
    near = difflib.get_close_matches(name, known, 1)
    raise UnknownNameError(
        f"No {what} is called {name!r}",
        expected=f"one of {', '.join(known)}",
        fix=f"Did you mean {near[0]!r}?" if near else "",
    )
