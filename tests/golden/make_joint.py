"""How the golden mark with joint bits was made: as ``make_ensemble.py``, once."""

from __future__ import annotations

from golden.make_ensemble import make
from gradmark import FilterGradient
from gradmark.ensemble import Ensemble
from gradmark.schemes.class_contrast import ClassContrast
from gradmark.schemes.trigger import Trigger

if __name__ == "__main__":
    parts = (FilterGradient(bits=32, step=0.1), ClassContrast(bits=48), Trigger(bits=24))
    make("joint", Ensemble(parts), seed=2)
