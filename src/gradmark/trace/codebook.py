"""Every licensee's bits: derived from the owner's key and the licensee's name, stored nowhere.

All copies of one marked model share their probes (directions, contrasts, carriers, reference), which
belong to a key of their own derived from the owner's. Copies differ in their bits alone. So
one reading of a suspect serves all licensees, and comparing it with each is one matrix product.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import numpy as np
import torch
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.kdf.hkdf import HKDFExpand
from numpy.typing import NDArray
from torch import Tensor, nn

from gradmark.ensemble import Ensemble, EnsembleMark
from gradmark.files import canonical_json
from gradmark.keys import OwnerKey
from gradmark.protocols import Access, Batch, ModelSpec, Reading

Told = Callable[[int, int], None]
"""Told how many licensees of how many are done."""
_TOLD_EVERY = 5000


def tracing_key(key: OwnerKey, base: str) -> OwnerKey:
    """The key of all copies' probes and bits: of its own for each base mark (``base``: its digest)."""
    return OwnerKey(key.derive("trace", 32, context=base.encode()), key.owner)


@dataclass(frozen=True)
class Codebook:
    """Bits of any licensee: HKDF-Expand (RFC 5869) of ``secret`` with his name as info."""

    secret: bytes = field(repr=False)
    n_bits: int

    @classmethod
    def of(cls, probes: Ensemble, key: OwnerKey, mark: EnsembleMark) -> Codebook:
        """The codebook of copies that carry ``probes``'s ``mark`` of the tracing ``key``.

        The secret hangs on everything public about the probes, the sealed reference included, so the bits
        can't be older than what was measured without them.
        """
        public = {"scheme": probes.name, "parameters": probes.parameters(), "spec": mark.spec.to_json()}
        secret = key.derive("licensees", 32, context=canonical_json(public))
        return cls(secret, len(mark.bits))

    def table(self, licensees: Sequence[str], told: Told = lambda *_: None) -> NDArray[np.int8]:
        """(m, n) of +1 and -1: every licensee's bits, a row each."""
        size = (self.n_bits + 7) // 8
        raw = bytearray()
        for i, licensee in enumerate(licensees):
            raw += HKDFExpand(hashes.SHA256(), size, licensee.encode()).derive(self.secret)
            if (i + 1) % _TOLD_EVERY == 0:
                told(i + 1, len(licensees))
        packed = np.frombuffer(raw, dtype=np.uint8).reshape(len(licensees), size)
        return np.unpackbits(packed, axis=1, count=self.n_bits).astype(np.int8) * np.int8(2) - np.int8(1)


@dataclass(frozen=True)
class Fingerprint:
    """A scheme of one copy: the probes that all copies share, with ``licensee``'s bits.

    ``probes``: calibrated on the marked model that the copies are made from.
    """

    probes: Ensemble
    licensee: str

    name: ClassVar[str] = "fingerprint"
    reads: ClassVar[str] = "gradients"
    margin: ClassVar[float] = 1.0
    target_log10_p: ClassVar[float] = -200.0

    def parameters(self) -> dict[str, Any]:
        """Those of the shared probes; the licensee isn't among them."""
        return self.probes.parameters()

    def mark(self, key: OwnerKey, spec: ModelSpec) -> EnsembleMark:
        """``key``: the tracing key."""
        shared = self.probes.mark(key, spec)
        bits = torch.from_numpy(Codebook.of(self.probes, key, shared).table([self.licensee])[0]).float()
        parts = zip(shared.parts, bits.split(shared.sizes), strict=True)
        return replace(shared, parts=tuple(replace(part, bits=own) for part, own in parts))

    def probe(
        self, mark: EnsembleMark, model: nn.Module, batch: Batch, generator: torch.Generator, method: Any
    ) -> tuple[Tensor, Tensor]:
        return self.probes.probe(mark, model, batch, generator, method)

    def read(
        self,
        mark: EnsembleMark,
        suspect: Any,
        pool: Batch,
        *,
        access: Access,
        carriers: int,
        queries: int = 0,
    ) -> Reading:
        return self.probes.read(mark, suspect, pool, access=access, carriers=carriers, queries=queries)
