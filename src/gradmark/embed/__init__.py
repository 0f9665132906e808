"""Embedding: the one-line marker, the preflight, and the loop behind ``gradmark embed``."""

from gradmark.embed.marker import Marker
from gradmark.embed.preflight import Check, check_method, choose_method
from gradmark.embed.status import MarkStatus
from gradmark.embed.surroundings import Finding, Preflight, survey
from gradmark.embed.train import Progress, Recipe, train
from gradmark.views import accuracy_of

__all__ = [
    "Check",
    "Finding",
    "MarkStatus",
    "Marker",
    "Preflight",
    "Progress",
    "Recipe",
    "accuracy_of",
    "check_method",
    "choose_method",
    "survey",
    "train",
]
