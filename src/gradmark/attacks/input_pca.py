"""An API that reconstructs every input from its principal components (Hendrycks & Gimpel 2017)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gradmark.guards import Guard
from gradmark.protocols import Thief

_ROWS = 4000  # inputs that the components are fitted on, at most


@dataclass(frozen=True)
class InputPca:
    """Keep as many components of the thief's inputs as explain ``share`` of their variance."""

    share: float = 0.95

    name = "input-pca"

    def run(self, model: nn.Module, thief: Thief, generator: torch.Generator) -> nn.Module:
        rows = torch.randperm(len(thief.x), generator=generator)[:_ROWS]
        x = thief.x[rows].flatten(1).float()
        mean = x.mean(0)
        seed = int(torch.randint(2**62, (), generator=generator))
        basis = _components(x - mean, self.share, seed)

        def before(x: Tensor, noise: torch.Generator) -> Tensor:
            centre, axes = mean.to(x), basis.to(x)
            return ((x.flatten(1) - centre) @ axes @ axes.T + centre).reshape(x.shape)

        return Guard(model, generator, before=before)


def _components(x: Tensor, share: float, seed: int) -> Tensor:
    """The first principal axes (features, k) of centred rows (n, features)."""
    total, q, most = float(x.square().sum()), 32, min(x.shape)
    while True:
        q = min(q, most)
        with torch.random.fork_rng(devices=[]):  # the sketch draws from the global state
            torch.manual_seed(seed)
            _, s, v = torch.pca_lowrank(x, q, center=False)
        explained = s.square().cumsum(0)
        if q == most or float(explained[-1]) >= share * total:
            k = int((explained < share * total).sum()) + 1
            basis: Tensor = v[:, :k]
            return basis
        q *= 2
