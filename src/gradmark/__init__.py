"""Sign a neural network with its own gradients, and prove it is yours.

Embed while you train, with one line in your own loop::

    from gradmark import Marker, ModelSpec, ModuleSuspect, OwnerKey, catalog

    key = OwnerKey.generate("Acme Ltd")
    spec = ModelSpec("image", (3, 32, 32), n_classes=10, low=0.0, high=1.0, levels=255)
    scheme = catalog.scheme("ensemble").calibrated(key, spec, ModuleSuspect(unmarked), (x_held, y_held))
    marker = Marker(scheme, key, spec, budget=0.5)
    ...
    loss = task_loss + marker.penalty(model, (x, y))

Later, ask any suspect, with the file in hand or only an API to ask::

    from gradmark import MarkFile, open_suspect, verify

    verdict = verify(MarkFile.load("mark.json"), key, open_suspect("suspect.pt2"), (x_test, y_test))
    verdict.outcome, verdict.log10_p

Start reading the source at :mod:`gradmark.protocols`.
"""

from gradmark import catalog
from gradmark._version import __version__
from gradmark.codec import MarkFile
from gradmark.embed import Marker
from gradmark.ensemble import Ensemble
from gradmark.errors import GradmarkError
from gradmark.keys import OwnerKey
from gradmark.protocols import ModelSpec, Reading, Verdict
from gradmark.schemes.class_contrast import ClassContrast
from gradmark.schemes.filter_gradient import FilterGradient
from gradmark.suspects import ModuleSuspect, open_suspect
from gradmark.verify import verify

__all__ = [
    "ClassContrast",
    "Ensemble",
    "FilterGradient",
    "GradmarkError",
    "MarkFile",
    "Marker",
    "ModelSpec",
    "ModuleSuspect",
    "OwnerKey",
    "Reading",
    "Verdict",
    "__version__",
    "catalog",
    "open_suspect",
    "verify",
]
