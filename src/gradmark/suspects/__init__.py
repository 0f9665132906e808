"""Suspects: a live module, a model file, a function or an endpoint, all asked in the same way.

``open_suspect`` takes whatever a user names. Every suspect has ``name``, ``digest`` and ``query``;
a ``ModuleSuspect`` also has ``vjp``.
"""

from gradmark.suspects.callable import CallableSuspect
from gradmark.suspects.checks import check_scores
from gradmark.suspects.files import build_model, file_digest, load_factory, open_suspect
from gradmark.suspects.http import HttpSuspect
from gradmark.suspects.module import ModuleSuspect, weights_digest
from gradmark.suspects.onnx import OnnxSuspect
from gradmark.suspects.transport import public_name
from gradmark.suspects.weights import load_weights, save_weights

__all__ = [
    "CallableSuspect",
    "HttpSuspect",
    "ModuleSuspect",
    "OnnxSuspect",
    "build_model",
    "check_scores",
    "file_digest",
    "load_factory",
    "load_weights",
    "open_suspect",
    "public_name",
    "save_weights",
    "weights_digest",
]
