"""Keyed contrasts of wrong classes: the free room that labels leave."""

from __future__ import annotations

import torch
from torch import Tensor

from gradmark.carriers import orthonormal
from gradmark.errors import UsageError
from gradmark.keys import OwnerKey
from gradmark.protocols import ModelSpec

_MOST = 1 << 28  # numbers


def wrong_class_contrasts(key: OwnerKey, spec: ModelSpec, count: int, groups: int, context: bytes) -> Tensor:
    """(C, L, C) keyed orthogonal contrasts of each class's wrong classes, of norm sqrt(2).

    Every group of classes has a keyed basis; a class's contrasts are the orthonormal vectors nearest
    to it (Loewdin) among those that sum to zero and leave the class itself out. With two classes
    nothing but their difference is left, whatever the label. Raises UsageError where there are too many
    classes to compare them all.
    """
    c = spec.n_classes
    if c * c * count > _MOST:
        raise UsageError(
            "Too many classes for contrasts of all of them",
            expected=f"{int((_MOST / count) ** 0.5)} at most",
            found=str(c),
        )
    if c == 2:
        return torch.tensor([1.0, -1.0]).expand(2, 1, 2).clone()
    raw = torch.from_numpy(key.normals("contrasts", (groups, c, count), context=context))
    basis = orthonormal(raw - raw.mean(1, keepdim=True))
    out = torch.empty(c, count, c)
    for label in range(c):
        others = torch.ones(c, 1, dtype=raw.dtype)
        others[label] = 0
        a = basis[label % groups] * others
        left, _, right = torch.linalg.svd(a - others * a.sum(0) / (c - 1), full_matrices=False)
        out[label] = (left @ right).T.float() * 2**0.5  # the size of a difference of two logits
    return out
