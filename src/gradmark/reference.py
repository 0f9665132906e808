"""What an unmarked network reads along a mark's secrets: measured beforehand, and taken away.

Networks that were trained for one task answer alike: what they read along the same directions is
correlated by .9 and more (``docs/science.md``). That common part is noise to a mark. Measured
once on an unmarked network, it can be projected out of every later reading. The bits are derived
from the key *and these numbers*, so the numbers cannot have been chosen to fit the bits, whoever
measured them and on whatever: the signs stay fair coins and the tests exact. They are kept sealed
in the mark file, since they would tell a thief something about the secret directions.
"""

from __future__ import annotations

import base64
import binascii

import numpy as np
import torch
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESSIV
from torch import Tensor

from gradmark.errors import MarkFileError
from gradmark.keys import OwnerKey

_PURPOSE = "reference"


def seal(key: OwnerKey, values: Tensor, context: bytes) -> str:
    """``values`` (n,) as text that only the key opens: AES-SIV of float32, in base64.

    Deterministic, so that equal numbers give an equal mark.
    """
    return seal_bytes(key, values.detach().cpu().numpy().astype("<f4").tobytes(), context)


def seal_bytes(key: OwnerKey, data: bytes, context: bytes) -> str:
    """``data``, one byte at least, as text that only the key opens."""
    return base64.b64encode(AESSIV(_secret(key, context)).encrypt(data, [context])).decode()


def unseal(key: OwnerKey, text: str, context: bytes, n: int) -> Tensor:
    """The numbers (n,), float64. MarkFileError where they were changed or don't fit key and mark."""
    data = unseal_bytes(key, text, context)
    values = torch.from_numpy(np.frombuffer(data[: len(data) // 4 * 4], dtype="<f4").astype(np.float64))
    if len(data) != 4 * n or not bool(torch.isfinite(values).all()):
        raise MarkFileError(
            "The mark's reference readings don't fit the mark",
            expected=f"{n} numbers",
            found=str(len(values)),
        )
    return values


def unseal_bytes(key: OwnerKey, text: str, context: bytes) -> bytes:
    """What was sealed. Raises MarkFileError where it was changed or isn't this key's and this mark's."""
    try:
        sealed = base64.b64decode(text, validate=True)
        if base64.b64encode(sealed).decode() != text:
            raise ValueError("another way to write the same bytes")  # which would draw other bits
        return AESSIV(_secret(key, context)).decrypt(sealed, [context])
    except (InvalidTag, ValueError, TypeError, binascii.Error) as cause:
        raise MarkFileError(
            "The mark's reference readings can't be opened",
            expected="numbers sealed with the mark's own key",
            fix="Take the mark file and the key that embed used",
        ) from cause


def without(values: Tensor, reference: Tensor | None) -> Tensor:
    """``values`` (n,) less their projection on ``reference`` (n,): how much of it they hold is fitted.

    A projection, since another training or architecture scales all natural readings alike. Readings
    of exactly zero, which are none, stay zero.
    """
    return values if reference is None else values - natural(values, reference)


def natural(values: Tensor, reference: Tensor) -> Tensor:
    """The part (n,) of ``values`` that :func:`without` takes away."""
    known = torch.where(values == 0, torch.zeros_like(values), reference.to(values))
    energy = known @ known
    return known * ((values @ known) / energy) if float(energy) > 0 else torch.zeros_like(values)


def _secret(key: OwnerKey, context: bytes) -> bytes:
    return key.derive(_PURPOSE, 64, context=context)
