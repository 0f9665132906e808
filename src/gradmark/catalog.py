"""Names to classes: two explicit tables, and a hint for a misspelt name."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from typing import Any

from gradmark.attacks.adversarial import Adversarial
from gradmark.attacks.dark_noise import DarkNoise
from gradmark.attacks.fine_prune import FinePrune
from gradmark.attacks.finetune import FineTune
from gradmark.attacks.flatten import Flatten, SelfDistill, SubtractMean
from gradmark.attacks.gradient_masking import GradientMasking
from gradmark.attacks.launder import Launder
from gradmark.attacks.lora import LoRA
from gradmark.attacks.overwrite import Overwrite
from gradmark.attacks.prune import Prune
from gradmark.attacks.quantize import Quantize
from gradmark.attacks.regularize import Regularize
from gradmark.attacks.retrain import FineTuneLast, RetrainAll, RetrainLast
from gradmark.attacks.smooth import Smooth
from gradmark.errors import MarkFileError, UnknownNameError
from gradmark.protocols import Attack, Scheme
from gradmark.schemes.filter_gradient import FilterGradient

FLAGSHIP = "filter-gradient"
SCHEMES: dict[str, type[Any]] = {"filter-gradient": FilterGradient}
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
}


def scheme(name: str, parameters: dict[str, Any] | None = None) -> Scheme:
    """The scheme called ``name``. Raises UnknownNameError, MarkFileError on unknown parameters."""
    kind = SCHEMES[_known(name, SCHEMES, "scheme")]
    try:
        made: Scheme = kind(**(parameters or {}))
        return made
    except TypeError as cause:
        raise MarkFileError(
            f"This version doesn't know the parameters of scheme {name}",
            expected=", ".join(kind.__dataclass_fields__),
            found=", ".join(parameters or {}),
            fix="upgrade gradmark",
        ) from cause


def attack(name: str, parameters: dict[str, Any] | None = None) -> Attack:
    """The attack called ``name``. Raises UnknownNameError."""
    return ATTACKS[_known(name, ATTACKS, "attack")](**(parameters or {}))


def _known(name: str, table: dict[str, Any], what: str) -> str:
    if name in table:
        return name
    near = difflib.get_close_matches(name, table, 1)
    raise UnknownNameError(
        f"No {what} is called {name!r}",
        expected=f"one of {', '.join(table)}",
        fix=f"did you mean {near[0]!r}?" if near else "",
    )
