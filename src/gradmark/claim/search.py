"""What a claim's threshold means against somebody who searches for a mark that fits.

He may choose key and parameters after the fact, and tries 2**60 of them: the best of N tries has a p near
1 / N. Where every try draws all bits anew there is no more to it. In a mark whose parts have bits of their
own, as marks had before they were joint, he tries the parameters of one part at a time, and Fisher's product
of the best he found is worth N tries *for each part*. So there each part's p counts N times, and what parts
he then takes counts as well.
"""

from __future__ import annotations

import math

from gradmark import catalog
from gradmark.codec import MarkFile
from gradmark.ensemble import Ensemble
from gradmark.stats import fisher

TRIES = 60 * math.log10(2)
"""log10 of how many a claim has to stand against."""


def searchable(mark: MarkFile) -> bool:
    """Whether parts of ``mark`` can be searched for one by one."""
    scheme = catalog.scheme(mark.scheme, mark.scheme_parameters)
    return isinstance(scheme, Ensemble) and not scheme.joint and len(scheme.parts) > 1


def combined(log10_ps: list[float]) -> float:
    """log10 of the chance that a search of 2**60 tries for each part finds parts with p such as these.

    To be compared with 2**60 alpha, the chance that a claim's threshold leaves to any search.
    """
    chosen = len(catalog.SCHEMES) * math.log10(2)  # which of the schemes are in
    return min(0.0, fisher([min(0.0, p + TRIES) for p in log10_ps]) + chosen)
