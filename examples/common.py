"""What the examples share: digits, a small network, a key that protects nothing, and the owner's question."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gradmark import FilterGradient, Marker, MarkFile, ModuleSuspect, OwnerKey, Verdict, verify
from gradmark.data import load_data

DATA = load_data("digits")
KEY = OwnerKey.from_seed(0, "Example")  # yours comes from OwnerKey.load("acme.key", passphrase)
SCHEME = FilterGradient(bits=64, step=0.1)


def network() -> nn.Module:
    """Two convolutions for 8x8 images in grey, and a linear layer."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 64, 3, 2, 1), nn.ReLU(),
        nn.Flatten(), nn.Linear(64 * 16, 10),
    )  # fmt: skip


def marker(scheme: FilterGradient = SCHEME) -> Marker:
    return Marker(scheme, KEY, DATA.spec, carriers=64, every=1)


def batches(epochs: int, size: int = 64) -> list[tuple[Tensor, Tensor]]:
    """Training batches in a fixed order: inputs (b, 1, 8, 8) and labels (b,)."""
    train, found = DATA.to_train(), []
    for epoch in range(epochs):
        order = torch.randperm(len(train), generator=torch.Generator().manual_seed(epoch))
        found += [train.batch(rows) for rows in order.split(size) if len(rows) == size]
    return found


def judge(model: nn.Module) -> Verdict:
    """What ``gradmark verify`` says of the trained network."""
    mark = MarkFile.create(KEY, SCHEME.name, SCHEME.parameters(), DATA.spec, "signed-rank", 200)
    found = verify(mark, KEY, ModuleSuspect(model.eval()), DATA.test.all())
    print(f"{found.outcome}: {found.n_match} of {found.n_bits} bits, log10 p = {found.log10_p:.1f}")
    return found
