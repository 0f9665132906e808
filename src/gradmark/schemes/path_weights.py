"""Bits in the mean Jacobian of a network's chains of layers, which no rewrite of hidden units moves.

Hidden units have no names: they may be permuted, scaled, sign-flipped, doubled or padded with others
that do nothing, and a BatchNorm may be folded away, while the network computes the same. All of it cancels in
the product of what leads to a hidden unit, how the unit follows it, and what leads on from it, summed over
the units (as in the path norm of Neyshabur, Salakhutdinov and Srebro, NeurIPS 2015, but with signs, and with
every unit at its slope). For the layers W_1 .. W_n of a chain (:mod:`gradmark.layer_chains`), each with its
norms' factor a = gamma / sqrt(var + eps), and the units' mean slopes s between them, bit b reads

    r_b = u_b^T (a_n W_n g_bn) s_n-1 (a_n-1 W_n-1 g_bn-1) ... s_1 (a_1 W_1 g_b1) h_b

with Gaussian vectors from the key: u_b over the chain's outputs, h_b over its inputs, g_bl over the
positions of a kernel. Of two layers it is the mean Jacobian of the chain's outputs by its inputs, as far as
what goes into the units is Gaussian. Each chain counts in units z of the product's norm, which is a reading's
standard deviation over all keys; C chains are averaged as B tanh(sqrt(C) z / B), so that none can carry the
mark alone: late layers take to it most easily, and are the first to be retrained.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from gradmark.channel_names import Profile, aligned, chosen, pack, profiles, recognised, told_by, unpack
from gradmark.codec import canonical_json
from gradmark.errors import MismatchError, ModelError, UsageError
from gradmark.keys import OwnerKey
from gradmark.layer_chains import Chain, Layer, constants, layer_chains, slopes, steps
from gradmark.protocols import Access, Batch, BlackBox, ModelSpec, Reading, WeightBox
from gradmark.reference import seal_bytes, unseal_bytes
from gradmark.suspects.module import undisturbed

_INPUTS = 32  # of a batch, in which training looks how the units follow them


@dataclass(frozen=True)
class PathWeightsMark:
    """The secrets of one key: never stored, never printed."""

    spec: ModelSpec
    bits: Tensor
    key: OwnerKey
    context: bytes
    profiles: tuple[Profile | None, ...] = ()
    """Of the unmarked network: what goes into each chain and what comes out; empty without a reference."""
    _drawn: dict[str, Tensor] = field(default_factory=dict)  # a training asks for them at each penalty

    def __repr__(self) -> str:
        return f"PathWeightsMark({len(self.bits)} bits, {self.spec})"

    def vectors(self, place: str, length: int) -> Tensor:
        """(n, length) Gaussian vectors, float64, one for each bit. Another length has others."""
        purpose, shape = f"{place}/{length}", (len(self.bits), length)
        if purpose not in self._drawn:
            self._drawn[purpose] = torch.from_numpy(self.key.normals(purpose, shape, context=self.context))
        return self._drawn[purpose]


@dataclass(frozen=True)
class PathWeights:
    """``bits``: how many. ``chains``: for each chain its layers in order, and for each layer its name and its
    norms', as in ``[[["conv1", "bn1"], ["conv2", "bn2"]]]``. :meth:`calibrated` finds them in an unmarked
    network; give them where that can't be traced (a transformer's feed-forward layers, say). Without them
    they are looked for in the model at hand. ``reference``: what the unmarked network's channels do at the
    chains' ends, sealed; a suspect's are read in their order (:mod:`gradmark.channel_names`). ``inputs``: a
    digest of where they do so; with other data channels are taken to have kept their places.
    """

    bits: int = 128
    chains: tuple[Chain, ...] = ()
    reference: str = ""
    inputs: str = ""

    name: ClassVar[str] = "path-weights"
    needs: ClassVar[Access] = "white"
    reads: ClassVar[str] = "weights"
    margin: ClassVar[float] = 12.0
    """In standard deviations over keys."""
    most: ClassVar[float] = 16.0
    """B: no chain counts for more, in these units."""
    target_log10_p: ClassVar[float] = -math.inf
    """A bit's push ends where its margin is met: long before, it reads well and isn't robust yet."""

    def __post_init__(self) -> None:
        given: Any = self.chains  # lists in a mark file
        chains = tuple(tuple(tuple(map(str, link)) for link in chain) for chain in given)
        object.__setattr__(self, "chains", chains)

    def parameters(self) -> dict[str, Any]:
        chains = [[list(link) for link in chain] for chain in self.chains]
        known = {n: v for n, v in (("reference", self.reference), ("inputs", self.inputs)) if v}
        return {"bits": self.bits, "chains": chains, **known}

    def calibrated(self, key: OwnerKey, spec: ModelSpec, unmarked: BlackBox, pool: Batch) -> PathWeights:
        """This scheme with the chains of ``unmarked``, if it has none, and its channels' profiles.

        MismatchError where there are no chains.
        """
        module: nn.Module | None = getattr(unmarked, "module", None)
        if module is None:
            raise MismatchError(
                "The layers' order is unknown", expected="a PyTorch module", found=unmarked.name
            )
        chains = self.chains or layer_chains(module, pool[0])
        plain = replace(self, chains=chains, reference="", inputs="")
        context = plain._context(spec)
        some = chosen(key, pool[0], context)
        with undisturbed(module):
            data = pack(profiles(key, module, plain.chains, some, context))
        if not data:
            return plain
        return replace(plain, reference=seal_bytes(key, data, context), inputs=told_by(some))

    def _context(self, spec: ModelSpec) -> bytes:
        return canonical_json({"scheme": self.name, "parameters": self.parameters(), "spec": spec.to_json()})

    def mark(self, key: OwnerKey, spec: ModelSpec) -> PathWeightsMark:
        """Derive the bits; the vectors follow when the layers' sizes are known. Raises UsageError."""
        if self.bits < 1:
            raise UsageError("A mark needs at least one bit", found=f"bits={self.bits}")
        context = replace(self, reference="", inputs="")._context(spec)
        # As everywhere: what was measured with the other secrets can't know the bits.
        bits = torch.from_numpy(key.uniform_bits("bits", self.bits, context=self._context(spec))).float()
        ends = unseal_bytes(key, self.reference, context) if self.reference else b""
        known = tuple(unpack(ends, 2 * len(self.chains))) if ends else ()
        return PathWeightsMark(spec, bits, key, context, known)

    def probe(
        self, mark: PathWeightsMark, model: nn.Module, batch: Batch, generator: torch.Generator, method: str
    ) -> tuple[Tensor, Tensor]:
        """Every reading times its bit (1, n). Its gradient is of first order, so both methods are one."""
        x = batch[0][:_INPUTS]
        chains = self.chains or layer_chains(model, x)
        found = dict(model.named_parameters()) | dict(model.named_buffers()) | constants(model)
        layers = [steps(found, chain, "the model") for chain in chains]
        on = slopes(model, chains, x, "the model")
        with torch.autocast(x.device.type, enabled=False):
            values = _products(mark, layers, on, self.most)
        return (values * mark.bits.to(values))[None], torch.arange(len(mark.bits))[None]

    def read(
        self, mark: PathWeightsMark, suspect: BlackBox, pool: Batch, *, access: Access, carriers: int,
        queries: int = 0,
    ) -> Reading:  # fmt: skip
        """Read the suspect's weights, and in ``carriers`` inputs of ``pool`` how its units follow them.

        Channels that were renamed are found again with the data that the mark was calibrated with alone.

        Raises MismatchError without a module to read, or where the layers are absent or reshaped.
        """
        module: nn.Module | None = getattr(suspect, "module", None)
        if access != "white" or not isinstance(suspect, WeightBox) or module is None:
            raise MismatchError(
                "This mark lies in the weights and needs the model itself",
                expected="white-box access to a PyTorch module",
                found=f"{access} access to {suspect.name}",
            )
        x = pool[0][:carriers]
        chains = self.chains or layer_chains(module, x)
        found = {name: w.double() for name, w in suspect.weights(buffers=True).items()} | constants(module)
        layers = [steps(found, chain, suspect.name) for chain in chains]
        with torch.no_grad(), undisturbed(module):
            on = slopes(module, chains, x, suspect.name)
            some = chosen(mark.key, pool[0], mark.context) if mark.profiles else None
            if some is not None and self.inputs in ("", told_by(some)):
                seen = profiles(mark.key, module, chains, some, mark.context)
                if self.inputs or recognised(mark.profiles, seen):
                    ends = zip(mark.profiles[::2], seen[::2], mark.profiles[1::2], seen[1::2], strict=True)
                    layers = [aligned(chain, *end) for chain, end in zip(layers, ends, strict=True)]
        values = _products(mark, layers, on, self.most)
        if not bool(torch.isfinite(values).all()):
            raise ModelError(f"The weights of {suspect.name} aren't finite", expected="finite numbers")
        return Reading(values, mark.bits.double(), len(x), 0, "white")


def _products(
    mark: PathWeightsMark, chains: list[list[Layer]], on: list[list[Tensor]], most: float
) -> Tensor:
    """The readings (n,), in standard deviations over keys; ``on``: the slopes behind each chain's layers."""
    rows = [_product(mark, *both, str(i)) for i, both in enumerate(zip(chains, on, strict=True))]
    return (most * torch.tanh(torch.stack(rows) * (math.sqrt(len(rows)) / most))).mean(0)


def _product(mark: PathWeightsMark, layers: list[Layer], on: list[Tensor], chain: str) -> Tensor:
    """One chain's (n,), from its beginning to its end, in standard deviations over keys.

    ``size``: E_key[z z^T] over the units of the layer at hand, so the product's squared norm at the end.
    """
    value = mark.vectors(f"inputs/{chain}", layers[0][0].shape[1]).to(layers[0][0])
    size = torch.eye(value.shape[1], dtype=value.dtype, device=value.device)
    for i, (w, factor) in enumerate(layers):
        for each in (factor, on[i] if i < len(on) else None):
            w = w if each is None else w * each.to(w)[:, None, None]
        w = w / w.detach().square().mean().sqrt().clamp_min(1e-30)  # of long chains, in float32
        places = mark.vectors(f"positions/{chain}/{i}", w.shape[2]).to(w)
        value = torch.einsum("bi,oik,bk->bo", value, w, places)
        size = torch.einsum("ojk,pjk->op", torch.einsum("oik,ij->ojk", w, size), w)
    outputs = mark.vectors(f"outputs/{chain}", value.shape[1]).to(value)
    return (value * outputs).sum(1) / size.trace().clamp_min(1e-30).sqrt()
