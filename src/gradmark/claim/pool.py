"""A digest of the inputs that a mark is read with, order included: a pool that can't be swapped later."""

from __future__ import annotations

import hashlib

from gradmark.files import canonical_json
from gradmark.protocols import Batch


def pool_digest(pool: Batch) -> str:
    """``sha256:`` of the canonical JSON of ``{"pool": 1, "shape", "labels"}``, a line feed, the inputs as
    little-endian float32 in C order, and the labels as little-endian int64.

    ``pool``: inputs (n, *shape) as the model sees them and labels (n,).
    """
    x, labels = pool
    head = canonical_json({"pool": 1, "shape": list(x.shape), "labels": len(labels)})
    found = hashlib.sha256(head + b"\n")
    for part in x.split(1024):
        found.update(part.contiguous().numpy().astype("<f4").tobytes())
    found.update(labels.contiguous().numpy().astype("<i8").tobytes())
    return "sha256:" + found.hexdigest()
