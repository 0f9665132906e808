"""Which channel of a suspect is which: told by what it does, not by its place.

The channels of a residual stream have no names: who renames them in every layer that writes or reads the
stream, and scales them, changes nothing that the network answers. What a channel does on natural inputs is
its own, also after a retraining. So an unmarked network's channels are *profiled* before the bits are
drawn, at keyed points of keyed inputs, and a suspect's are assigned to them (Kuhn 1955; Ainsworth, Hayase and
Srinivasa, ICLR 2023, match two networks alike). The bits hang on the profiles, and the assignment hangs on
the profiles and the suspect alone: whatever is matched to whatever, no bit is favoured.
"""

from __future__ import annotations

import hmac
import struct
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from gradmark.errors import MarkFileError
from gradmark.files import sha256
from gradmark.keys import OwnerKey
from gradmark.layer_chains import Chain, Layer
from gradmark.suspects.module import fed

_INPUTS = 32
_POINTS = 256  # a channel: a profile's correlation is known to 1/16
_FEWEST = 64
_ROOM = 300_000  # bytes of all profiles; a mark file has room for a mebibyte
_NAMED = 0.99  # correlation with the model's own inputs or scores, which have names
_STILL = 1e-3  # of the median channel's size
_TWINS = 0.9999  # correlation
_DIGEST = 16  # characters
_KNOWN = 0.3  # mean correlation of channels with those they are taken for
_STEP = 4 / 127  # of a profile's deviations in one byte


@dataclass(frozen=True)
class Profile:
    """``values`` (C, points): of unit mean square, or zero. ``size`` (C,): their deviation before."""

    values: Tensor
    size: Tensor


def profiles(
    key: OwnerKey, model: nn.Module, chains: Sequence[Chain], pool: Tensor, context: bytes
) -> list[Profile | None]:
    """What goes into each chain and what comes out of it, in turn; None where that has names: the model's
    inputs, its scores. ``pool`` (b, *shape): natural inputs, of which the key takes 32; a forward pass
    of them, in the model's own mode."""
    given = fed(model, chosen(key, pool, context))
    kept: dict[int, Tensor] = {}
    with ExitStack() as stack, torch.no_grad():
        for i, chain in enumerate(chains):
            first, last = model.get_submodule(chain[0][0]), _last(model, chain[-1])
            stack.callback(first.register_forward_pre_hook(_keep(kept, 2 * i)).remove)
            stack.callback(last.register_forward_hook(_keep(kept, 2 * i + 1)).remove)
        scores = model(given)
    named = [v.detach().flatten(1).cpu().double() for v in (given, scores) if isinstance(v, Tensor)]
    return [
        None
        if i not in kept or any(_same(kept[i], v) for v in named)
        else _profile(key, kept[i].flatten(0, -2).cpu().double(), context)
        for i in range(2 * len(chains))
    ]


def pack(found: Sequence[Profile | None]) -> bytes:
    """Profiles as bytes: their length, then for each end the channels' number (0: named), values, sizes.

    Empty where all ends are named, or the channels are too many for a mark file.
    """
    channels = sum(len(p.size) for p in found if p is not None)
    points = min(_POINTS, _ROOM // max(1, channels))
    if not channels or points < _FEWEST:
        return b""
    parts = [struct.pack("<H", points)]
    for p in found:
        parts.append(struct.pack("<I", 0 if p is None else len(p.size)))
        if p is not None:
            values = (p.values[:, :points] / _STEP).round().clamp(-127, 127)
            parts += [values.numpy().astype("i1").tobytes(), p.size.numpy().astype("<f4").tobytes()]
    return b"".join(parts)


def unpack(data: bytes, ends: int) -> list[Profile | None]:
    """What :func:`pack` wrote of ``ends`` ends. Raises MarkFileError on anything else."""
    try:
        (points,), at, found = struct.unpack_from("<H", data), 2, list[Profile | None]()
        for _ in range(ends):
            (n,), at = struct.unpack_from("<I", data, at), at + 4
            values = np.frombuffer(data, "i1", n * points, at).reshape(n, points)
            size = np.frombuffer(data, "<f4", n, at := at + n * points)
            at += 4 * n
            whole = torch.from_numpy(values.astype(float)) * _STEP, torch.from_numpy(size.astype(float))
            found.append(Profile(*whole) if n else None)
        if at != len(data):
            raise ValueError("something follows")
    except (struct.error, ValueError) as cause:
        raise MarkFileError(
            "The mark's profiles don't fit its chains", expected=f"{ends} ends", found=f"{len(data)} bytes"
        ) from cause
    return found


def told_by(some: Tensor) -> str:
    """A digest of the :func:`chosen` inputs that channels are profiled at: equal where data are the same."""
    numbers = some.detach().cpu().float().contiguous().numpy()
    return sha256(numbers.tobytes()).removeprefix("sha256:")[:_DIGEST]


def recognised(known: Sequence[Profile | None], seen: Sequence[Profile | None]) -> bool:
    """Whether a suspect's channels were profiled at the inputs at which the known ones were, as far as these
    themselves tell: for marks that don't say at which (:func:`told_by`).

    Other data than the mark was calibrated with hold other inputs: profiles then agree as chance has it, to
    .15 in the mean over a ResNet-20's, where networks that aren't related agree to .4 at the same inputs. Who
    renames channels, and is read with other data, can't be followed.
    """
    found = [torch.zeros(0, dtype=torch.float64)]
    for a, b in zip(known, seen, strict=True):
        if a is not None and b is not None:
            some = [p.values[p.size > _STILL * p.size.median()] for p in (a, b)]
            likeness = some[0] @ some[1][:, : some[0].shape[1]].T / some[0].shape[1]
            found.append(likeness[linear_sum_assignment(-likeness.numpy())])
    each = torch.cat(found)
    return not len(each) or float(each.mean()) > _KNOWN


def aligned(
    layers: list[Layer],
    known_in: Profile | None, seen_in: Profile | None, known_out: Profile | None, seen_out: Profile | None,
) -> list[Layer]:  # fmt: skip
    """A suspect's chain with its inputs and its outputs in the order, and on the scale, of the known ones.

    A channel that stands still in either network counts for nothing: its weights could be anything. A
    suspect may have more channels than are known, or fewer.
    """
    found = list(layers)
    if known_in is not None and seen_in is not None:
        index, scale = _matched(known_in, seen_in)
        (w, factor), twins = found[0], _alike(seen_in)[index]  # a channel in several copies is their sum
        ratios = scale[:, None] * twins * (seen_in.size / seen_in.size[index].clamp_min(1e-30)[:, None])
        found[0] = torch.einsum("ojk,rj->ork", w, ratios.to(w)), factor
    if known_out is not None and seen_out is not None:
        index, scale = _matched(known_out, seen_out)
        w, factor = found[-1]
        back = torch.where(scale > 0, 1 / scale.clamp_min(1e-30), scale)
        found[-1] = w[index] * back.to(w)[:, None, None], None if factor is None else factor[index]
    return found


def _matched(known: Profile, seen: Profile) -> tuple[Tensor, Tensor]:
    """For each known channel the suspect's, and how much larger it is (0: none, or one stands still)."""
    likeness = known.values @ seen.values[:, : known.values.shape[1]].T
    rows, columns = linear_sum_assignment(-likeness.numpy())
    index, present = (
        torch.zeros(len(known.size), dtype=torch.long),
        torch.zeros(len(known.size), dtype=torch.bool),
    )
    index[rows], present[rows] = torch.from_numpy(columns), True
    present &= known.size > _STILL * known.size.median()
    return index, torch.where(
        present, seen.size[index] / known.size.clamp_min(1e-30), torch.zeros_like(known.size)
    )


def _alike(seen: Profile) -> Tensor:
    """Which of a suspect's channels (C, C) do the same, but for their scale: each itself, at least."""
    likeness = seen.values @ seen.values.T / seen.values.shape[1]
    return ((likeness > _TWINS) | torch.eye(len(likeness), dtype=torch.bool)).double()


def _last(model: nn.Module, link: tuple[str, ...]) -> nn.Module:
    """The norm behind a layer, or the layer where the norm has been folded away and is gone."""
    modules: dict[str, nn.Module] = dict(model.named_modules())
    return next(modules[name] for name in reversed(link) if name in modules)


def chosen(key: OwnerKey, pool: Tensor, context: bytes) -> Tensor:
    """The inputs that come first by a keyed digest: their order in the pool doesn't matter."""
    secret = key.derive("profiled inputs", 32, context=context)
    rows = pool.detach().cpu().reshape(len(pool), -1).contiguous().view(torch.uint8)
    digests = [hmac.digest(secret, row.numpy().tobytes(), "sha256") for row in rows]
    return pool[sorted(range(len(digests)), key=digests.__getitem__)[:_INPUTS]]


def _profile(key: OwnerKey, values: Tensor, context: bytes) -> Profile:
    """Of channels' values (rows, C) at the points of the key."""
    points = key.integers(f"profiled points/{len(values)}", _POINTS, len(values), context=context)
    some = values[torch.from_numpy(points)].T
    some = some - some.mean(1, keepdim=True)
    size = some.square().mean(1).sqrt()
    return Profile(some / size.clamp_min(1e-30)[:, None], size)


def _keep(table: dict[int, Tensor], place: int) -> Callable[..., None]:
    """A hook that keeps what a module gives out, or takes in, with the channels last."""

    def hook(module: nn.Module, taken: tuple[Tensor, ...], out: Tensor | None = None) -> None:
        value = (taken[0] if out is None else out).detach()
        table[place] = value if isinstance(module, nn.Linear) or value.ndim < 3 else value.movedim(1, -1)

    return hook


def _same(values: Tensor, named: Tensor) -> bool:
    """Whether ``values``, with the channels last, are ``named`` (n, numbers), scaled and shifted perhaps."""
    orders = (values, values.movedim(-1, 1)) if values.ndim > 2 else (values,)
    return values.numel() == named.numel() and any(
        _correlation(v.flatten().cpu().double(), named.flatten()) > _NAMED for v in orders
    )


def _correlation(a: Tensor, b: Tensor) -> float:
    a, b = a - a.mean(), b - b.mean()
    return float((a @ b) / (a.norm() * b.norm()).clamp_min(1e-30))
