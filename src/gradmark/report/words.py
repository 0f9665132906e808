"""Numbers in words that a reader without statistics can repeat in court without changing their meaning."""

from __future__ import annotations

import math
import platform
from datetime import UTC, datetime

import numpy as np
import scipy
import torch

from gradmark.protocols import JudgedBy

_RAISED = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")

TESTS: dict[JudgedBy, tuple[str, str]] = {
    "sign": (
        "Sign test (exact, one-sided)",
        "Each reading either agrees with its bit or doesn't; without the mark, each agreement is the toss of "
        "a fair coin. The p-value is the exact chance that at least as many tosses come out in the mark's "
        "favour.",
    ),
    "signed-rank": (
        "Wilcoxon's signed-rank test (exact, one-sided)",
        "The readings are ranked by their size, and the ranks of those that agree with their bits are added "
        "up, so that a clear reading counts for more than a faint one. Without the mark, a fair coin decides "
        "whether each rank is counted, and the p-value is the exact chance of a sum at least as large.",
    ),
    "sign-flip": (
        "Sign-flip test (exact, one-sided)",
        "The sizes of the readings that agree with their bits are added up, rounded to a fixed grid. Without "
        "the mark, a fair coin decides whether each size is counted, and the p-value is the exact chance of "
        "a sum at least as large.",
    ),
    "betting": (
        "Bets on secret bits (a test martingale; valid whenever it stops)",
        "The questions were asked in rounds. Before a bit was looked at, a stake was put on it at fair odds, "
        "by the answers alone and the bits already seen; each bit was bet on once. Without the mark the bits "
        "are fair coins, and no way to bet turns 1 into e or more with a chance above 1/e, whenever one "
        "stops. So the p-value is one divided by the most that was won.",
    ),
}

CARRIERS: dict[str, str] = {
    "filter-gradient": "When a natural input is nudged in a secret way, how do wrong classes' scores shift?",
    "class-contrast": "On natural inputs of a class, which wrong classes score higher?",
    "feature-contrast": "Within a class, which wrong classes score higher where a secret feature is strong?",
    "trigger": "As which of two classes is a secret abstract input taken?",
    "margin-trigger": "As which of two classes is a secret abstract input taken?",
    "probe-gradient": "When a secret abstract input is nudged in a secret way, how do the scores shift?",
    "gradsigns": "When secret pixels of inputs of one class are nudged, does the loss rise or fall?",
    "weights": "Is a secret weighted sum of one layer's weights positive or negative?",
    "path-weights": "Is a secret sum over the paths through hidden units positive or negative?",
    "linear": "When an input is nudged along this direction, does the loss rise or fall?",
}
"""What each scheme asks of a model, for people."""


PROGRAM = (
    "A program can hide what it does at other inputs: to rule that out, load the weights into your own code "
    "(a .safetensors with --model)."
)
"""Of a suspect whose file brings what is done with its weights."""


def power(exponent: int) -> str:
    """10 to ``exponent``: written out from 1 to a million, else with the exponent raised.

    >>> power(3), power(18), power(-19)
    ('1,000', '10¹⁸', '10⁻¹⁹')
    """
    return f"{10**exponent:,}" if 0 <= exponent <= 6 else "10" + str(exponent).translate(_RAISED)


def probability(log10_p: float) -> str:
    """The probability 10**log10_p to two digits, without underflow; rounded up, so never understated.

    >>> probability(-0.43), probability(-18.2), probability(0.0)
    ('0.38', '6.4 × 10⁻¹⁹', '1')
    """
    if log10_p >= 0:
        return "1"
    exponent = math.floor(log10_p)
    mantissa = math.ceil(10 ** (log10_p - exponent) * 10 - 1e-9) / 10
    if mantissa >= 10:
        mantissa, exponent = 1.0, exponent + 1
    if exponent >= -3:
        return f"{mantissa * 10.0**exponent:.{1 - exponent}f}".rstrip("0").rstrip(".")
    return f"{mantissa:.1f} × {power(exponent)}"


def odds(log10_p: float) -> str:
    """How often chance does as well, to follow the word "in"; never more impressive than the truth.

    >>> odds(-18.2), odds(-2.5), odds(-0.43)
    ('fewer than 1 of 10¹⁸', 'fewer than 1 of 100', 'about 38 of 100')
    """
    if log10_p > -1.3:
        return f"about {min(100, math.ceil(100 * 10**log10_p - 1e-9))} of 100"
    exponent = math.ceil(-log10_p) - 1
    return (
        f"fewer than 1 of {power(exponent)}"
        if exponent > 1
        else f"about {math.ceil(1000 * 10**log10_p)} of 1,000"
    )


def by_chance(log10_p: float, what: str = "keys") -> str:
    """The p-value as a sentence. The chance is in the key's bits and not in the choice of a model.

    >>> by_chance(-18.2)
    'By chance, fewer than 1 of 10¹⁸ keys match a model made without them this well.'
    """
    return f"By chance, {odds(log10_p)} {what} match a model made without them this well."


def level(alpha: float) -> str:
    """A threshold for p, as a power of ten where it is one.

    >>> level(1e-6), level(0.02)
    ('10⁻⁶', '0.02')
    """
    exponent = math.log10(alpha)
    return power(round(exponent)) if math.isclose(exponent, round(exponent)) else f"{alpha:g}"


def percent(value: float) -> str:
    """A share from 0 to 1 as percent with one digit."""
    return f"{100 * value:.1f}%"


def duration(seconds: float) -> str:
    """Seconds in the unit that suits them.

    >>> duration(2.14), duration(754), duration(7300)
    ('2.1 seconds', '12.6 minutes', '2.0 hours')
    """
    if seconds < 120:
        return f"{seconds:.1f} seconds"
    return f"{seconds / 60:.1f} minutes" if seconds < 7200 else f"{seconds / 3600:.1f} hours"


def versions(version: str) -> dict[str, str]:
    """The footer: when the report was written, and with which software."""
    return {
        "Written": f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
        "gradmark": version,
        "PyTorch": str(torch.__version__),
        "NumPy": np.__version__,
        "SciPy": scipy.__version__,
        "Python": platform.python_version(),
    }
