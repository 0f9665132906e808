"""What the laws in ``test_conformance.py`` are tried on: domains, tiny networks, suspects, oracles.

A new scheme is tried on every domain by its line in ``catalog.SCHEMES``, and so is the flagship, which
joins several; settings that a domain needs (a mono signal has fewer directions per tap) go into ``SETTINGS``.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradmark import catalog
from gradmark.codec import MarkFile
from gradmark.embed import Marker
from gradmark.keys import OwnerKey
from gradmark.protocols import Batch, Domain, ModelSpec, Reading, Scheme
from gradmark.stats import fisher, randomised_p
from gradmark.suspects import ModuleSuspect

CLASSES = 10
CARRIERS = 100
SPECS = {
    "grey": ModelSpec("image", (1, 8, 8), CLASSES, 0.0, 1.0, 255),
    "colour": ModelSpec("image", (3, 16, 16), CLASSES, 0.0, 1.0, 255),
    "vector": ModelSpec("vector", (20,), CLASSES),
    "mono": ModelSpec("signal", (256,), CLASSES, -1.0, 1.0, 65536),
    "stereo": ModelSpec("signal", (2, 256), CLASSES, -1.0, 1.0, 65536),
}
NAMES = [*catalog.SCHEMES, catalog.FLAGSHIP]
STEPS = {"grey": 0.2, "vector": 0.1, "mono": 0.1, "stereo": 0.1}
SETTINGS: dict[tuple[str, str], dict[str, Any]] = {
    # an ensemble's settings are its first part's
    **{(n, d): {"step": s} for n in ("filter-gradient", "ensemble") for d, s in STEPS.items()},
    **{("gradsigns", d): {"step": 0.1, "bits": 32} for d in ("grey", "colour", "mono", "stereo")},
    ("gradsigns", "vector"): {"step": 0.3, "bits": 28, "bits_per_carrier": 28},
    **{("feature-contrast", d): {"features": 2, "contrasts": 8 if d == "stereo" else 4} for d in SPECS},
}
# What a scheme needs of the Marker to be learnt whole within the few steps of ``trained``.
MARKERS: dict[tuple[str, str], dict[str, Any]] = {
    **{("gradsigns", d): {"method": "exact", "carriers": 50} for d in ("grey", "colour", "mono", "stereo")},
    ("gradsigns", "vector"): {"method": "central-difference", "carriers": 50, "weight": 10.0, "margin": 1.0},
    # Wrong classes compare by nature: uncalibrated, a mark has to outweigh that.
    **{("class-contrast", d): {"margin": 4.0} for d in SPECS},
    **{("feature-contrast", d): {"margin": 1.0, "carriers": 50, "weight": 30.0} for d in SPECS},
    **{("ensemble", d): {"margin": 3.0, "weight": 6.0} for d in SPECS},
}
# Settings with which a nudge is as good as a derivative, and how good that is.
FINE: dict[str, tuple[dict[str, Any], float]] = {
    "filter-gradient": ({"step": 0.01, "contrasts_per_carrier": 8}, 2e-3),
    "probe-gradient": ({"step": 0.01}, 2e-3),
    "gradsigns": ({"step": 1e-3}, 2e-2),
}
KEY = OwnerKey.from_seed(1, "Owner")


def scheme_for(name: str, domain: str, **more: Any) -> Scheme:
    """The scheme with the settings that the domain needs."""
    return catalog.scheme(name, {**SETTINGS.get((name, domain), {}), **more})


def inputs(domain: str, n: int, seed: int) -> Batch:
    """Separable classes: a smooth template each, at varying strength, and noise."""
    spec = SPECS[domain]
    templates = _smooth(torch.randn(CLASSES, *spec.input_shape, generator=_generator(7)), spec.domain)
    generator = _generator(1000 + seed)
    labels = torch.randint(CLASSES, (n,), generator=generator)
    shape = (n, *[1] * len(spec.input_shape))
    strength = 0.7 + 0.6 * torch.rand(shape, generator=generator)
    noise = _smooth(torch.randn(n, *spec.input_shape, generator=generator), spec.domain)
    x = templates[labels] * strength + 0.5 * noise
    if spec.domain == "image":
        x = 0.5 + 0.15 * x
    if spec.domain == "signal":
        x = 0.1 * x
    return spec.snap(x), labels


def _smooth(x: Tensor, domain: Domain) -> Tensor:
    """Unit noise with the neighbourly correlation of natural inputs."""
    if domain == "vector":
        return x
    axes = 2 if domain == "image" else 1
    flat = x.reshape(-1, 1, *x.shape[-axes:])
    pool = F.avg_pool2d if axes == 2 else F.avg_pool1d
    for _ in range(2):
        flat = pool(flat, 3, 1, 1)
    return (flat / flat.std()).reshape(x.shape) + 0.1 * x


def network(domain: str, seed: int = 0, activation: type[nn.Module] = nn.ReLU) -> nn.Sequential:
    """A tiny network whose last layers are Linear, activation, Linear."""
    spec = SPECS[domain]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        if spec.domain == "vector":
            body: list[nn.Module] = [nn.Linear(20, 64), activation()]
            wide = 64
        elif spec.domain == "image":
            channels = spec.input_shape[0]
            body = [nn.Conv2d(channels, 16, 3, padding=1), activation(), nn.AvgPool2d(2), nn.Flatten()]
            wide = 16 * (spec.input_shape[1] // 2) ** 2
        else:
            channels = 1 if len(spec.input_shape) == 1 else spec.input_shape[0]
            body = [nn.Unflatten(1, (1, -1))] if len(spec.input_shape) == 1 else []
            body += [
                nn.Conv1d(channels, 16, 9, stride=2, padding=4),
                activation(),
                nn.AvgPool1d(4),
                nn.Flatten(),
            ]
            wide = 16 * 32
        return nn.Sequential(*body, nn.Linear(wide, 64), activation(), nn.Linear(64, CLASSES))


@cache
@torch.enable_grad()
def trained(name: str, domain: str, marked: bool = True) -> nn.Sequential:
    """A network trained in a plain loop, with or without the one line that marks it. Don't change it."""
    model = network(domain)
    x, labels = inputs(domain, 1000, seed=0)
    scheme = scheme_for(name, domain)
    settings: dict[str, Any] = {"weight": 3.0, "margin": 0.5, **MARKERS.get((name, domain), {})}
    marker = Marker(scheme, KEY, SPECS[domain], every=1, **settings) if marked else None
    optimizer = torch.optim.Adam(model.parameters(), 5e-3)
    generator = _generator(5)
    for _ in range(15):
        for part in torch.randperm(len(x), generator=generator).split(50):
            loss = F.cross_entropy(model(x[part]), labels[part])
            if marker is not None:
                loss = loss + marker.penalty(model, (x[part], labels[part]))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return model.eval()


@cache
def pool(domain: str) -> Batch:
    """Inputs that no network was trained on."""
    return inputs(domain, 200, seed=1)


def mark_file(name: str, domain: str, key: OwnerKey = KEY, carriers: int = CARRIERS) -> MarkFile:
    """A mark file of ``key`` with fixed salt."""
    parameters = scheme_for(name, domain).parameters()
    return MarkFile.create(key, name, parameters, SPECS[domain], "signed-rank", carriers, salt=bytes(16))


class Counting:
    """A black box that counts the inputs it is sent."""

    name, digest = "counting", "sha256:" + "0" * 64

    def __init__(self, model: Callable[[Tensor], Tensor]) -> None:
        self.model, self.count = model, 0

    def query(self, x: Tensor) -> Tensor:
        self.count += len(x)
        with torch.no_grad():
            return self.model(x)


class Structured(nn.Module):
    """A stranger whose gradient is huge, smooth, and different for every class."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        ramp = torch.linspace(-1, 1, int(np.prod(shape)))
        frequencies = torch.arange(1, CLASSES + 1)[:, None]
        self.weight = nn.Parameter(1e4 * torch.cos(3.0 * frequencies * ramp))

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(1)
        return flat @ self.weight.T + 1e3 * (flat**2) @ self.weight.abs().T


def strangers(domain: str) -> dict[str, nn.Module]:
    """Networks that were made without the key."""
    spec = SPECS[domain]
    numb = network(domain, seed=3)
    with torch.no_grad():
        for weight in numb.parameters():
            weight.zero_()
    loud = network(domain, seed=4)
    with torch.no_grad():
        for weight in loud.parameters():
            weight.mul_(30.0)
    return {
        "random": network(domain, seed=2),
        "constant": numb,
        "loud": loud,
        "structured": Structured(spec.input_shape),
    }


def world(model: nn.Module) -> tuple[Any, ...]:
    """All that a reading must leave as it is, as comparable values."""
    return (
        {name: value.clone() for name, value in model.state_dict().items()},
        [part.training for part in model.modules()],
        [None if weight.grad is None else weight.grad.clone() for weight in model.parameters()],
        [weight.requires_grad for weight in model.parameters()],
        torch.get_rng_state(),
        np.random.get_state()[1].tolist(),  # noqa: NPY002  the global state is what must not move
        random.getstate(),
        torch.is_grad_enabled(),
    )


def same_world(a: tuple[Any, ...], b: tuple[Any, ...]) -> bool:
    """Bit for bit."""
    tensors = all(torch.equal(a[0][name], b[0][name]) for name in a[0]) and torch.equal(a[4], b[4])
    grads = all((g is None and h is None) or torch.equal(g, h) for g, h in zip(a[2], b[2], strict=True))
    return tensors and grads and (a[1], a[3], a[5], a[6], a[7]) == (b[1], b[3], b[5], b[6], b[7])


def rewritten(model: nn.Sequential, seed: int) -> nn.Sequential:
    """The same function with other weights: hidden units permuted, and scaled through their ReLU."""
    import copy

    twin = copy.deepcopy(model)
    first, last = twin[-3], twin[-1]
    assert isinstance(first, nn.Linear)
    assert isinstance(last, nn.Linear)
    generator = _generator(seed)
    order = torch.randperm(first.out_features, generator=generator)
    scale = torch.exp(2 * torch.randn(first.out_features, generator=generator))
    with torch.no_grad():
        first.weight.copy_((first.weight * scale[:, None])[order])
        first.bias.copy_((first.bias * scale)[order])
        last.weight.copy_((last.weight / scale)[:, order])
    return twin


def reads(name: str) -> str:
    """What the scheme reads: gradients, scores or weights."""
    kind: str = getattr(catalog.scheme(name), "reads", "gradients")
    return kind


def needs(name: str) -> str:
    """The access without which the scheme can't be read."""
    access: str = getattr(catalog.scheme(name), "needs", "black")
    return access


def uniform_p(reading: Reading, generator: np.random.Generator) -> float:
    """A p-value that is exactly uniform without the mark, also where parts are tested apart."""
    signed = (reading.values * reading.bits).split(list(reading.parts) or [len(reading.bits)])
    found = [randomised_p("signed-rank", part.numpy(), generator) for part in signed]
    return found[0] if len(found) == 1 else float(10 ** fisher([float(np.log10(p)) for p in found]))


def white(model: nn.Module, **more: Any) -> ModuleSuspect:
    return ModuleSuspect(model, name="model", **more)


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)
