"""What an API's owner could notice: single probes that look odd, and sequences that no user sends.

Probes are what a scheme really sends: a recorder stands before the model while ``scheme.read`` works
with a throwaway key. So any scheme can be audited.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import stats
from torch import Tensor

from gradmark.audit.gradients import FIRST_KEY
from gradmark.audit.measure import STRIKING_Z, Z95, Detector, discriminant, scored
from gradmark.keys import OwnerKey
from gradmark.protocols import Batch, BlackBox, ModelSpec, Scheme

PART = "queries"
_TOLERANCE = 0.05
_WINDOW = 200  # queries in a sequence whose distances are tested for normality


class Recorder:
    """A black box that remembers what it was asked and which class it answered."""

    def __init__(self, inner: BlackBox) -> None:
        self.inner, self.name, self.digest = inner, inner.name, inner.digest
        self._asked: list[Tensor] = []
        self._answered: list[Tensor] = []

    def query(self, x: Tensor) -> Tensor:
        """Scores (b, C), as the model behind gives them."""
        scores = self.inner.query(x)
        self._asked.append(x.detach().clone())
        self._answered.append(scores.argmax(1))
        return scores

    @property
    def probes(self) -> Batch:
        """All inputs asked, in order, and the classes answered."""
        return torch.cat(self._asked), torch.cat(self._answered)


def probes(
    scheme: Scheme, spec: ModelSpec, suspect: BlackBox, pool: Batch, queries: int, key: int = 0
) -> Batch:
    """The queries of one black-box reading of a throwaway key, and the classes answered."""
    recorder = Recorder(suspect)
    mark = scheme.mark(OwnerKey.from_seed(FIRST_KEY + 1000 + key, "nobody"), spec)
    scheme.read(mark, recorder, pool, access="black", carriers=len(pool[0]), queries=queries)
    return recorder.probes


def compare_queries(
    scheme: Scheme, spec: ModelSpec, suspect: BlackBox, data: Batch, queries: int,
    generator: torch.Generator,
) -> tuple[list[Detector], dict[str, Any]]:  # fmt: skip
    """Split ``data`` in four: what the API's owner knows, other users' inputs, and carriers of two keys.

    The classifier learns from one throwaway key's probes and is tried on another's.
    """
    order = torch.randperm(len(data[0]), generator=generator)
    known, users, first, second = ((data[0][i], data[1][i]) for i in order.chunk(4))
    learnt = probes(scheme, spec, suspect, first, queries, 0)[0]
    asked, classes = probes(scheme, spec, suspect, second, queries, 1)
    single = one_each(asked, second[0])
    near = {
        "other users": nearest(users[0], known[0]),
        "probes": nearest(single, known[0]),
        "probes, carriers known": nearest(single, torch.cat([known[0], second[0]])),
    }
    natural = near["other users"]
    found = [
        _distance("distance to known inputs", near["probes"], natural, "the API doesn't hold the carriers"),
        _distance("distance to known inputs, carriers among them", near["probes, carriers known"], natural,
                  "the API holds the very carriers"),
    ]  # fmt: skip
    features = [describe(v, spec) for v in (known[0], users[0], one_each(learnt, first[0]), single)]
    found += _classified(*features)
    sequence = {
        "probes": earlier(asked, classes),
        "other users": earlier(users[0], suspect.query(users[0]).argmax(1)),
    }
    found += _sequence(asked, users[0], sequence)
    names = list(statistic_names(spec))
    shown = {"near": near, "features": (names, features[1], features[3]), "examples": (second[0], asked)}
    return found, shown


def one_each(asked: Tensor, carriers: Tensor) -> Tensor:
    """One probe for each carrier it was made from, so that what is scored is independent."""
    origin = torch.cdist(asked.flatten(1), carriers.flatten(1)).argmin(1)
    first = torch.full((len(carriers),), -1)
    for i in range(len(asked) - 1, -1, -1):
        first[origin[i]] = i
    return asked[first[first >= 0]]


def nearest(x: Tensor, known: Tensor) -> NDArray[np.float64]:
    """Distance (n,) of each input to the nearest known one, per coordinate (root mean square)."""
    near: Tensor = torch.cdist(x.flatten(1), known.flatten(1)).amin(1) / x[0].numel() ** 0.5
    return np.asarray(near.double())


def earlier(asked: Tensor, classes: Tensor) -> NDArray[np.float64]:
    """Distance of each query to the nearest earlier one that got the same answer (PRADA, Juuti et al.,
    EuroS&P 2019); the first of each class is left out."""
    flat = asked.flatten(1)
    distance = torch.cdist(flat, flat, compute_mode="donot_use_mm_for_euclid_dist") / flat.shape[1] ** 0.5
    before = torch.ones(len(flat), len(flat), dtype=torch.bool).tril(-1)
    allowed = before & (classes[:, None] == classes[None])
    low = distance.masked_fill(~allowed, torch.inf).amin(1)
    return np.asarray(low[low.isfinite()].double())


def _distance(
    name: str, probes: NDArray[np.float64], natural: NDArray[np.float64], note: str
) -> Detector:  # fmt: skip
    """AUC of a distance: above .5 probes lie farther, below .5 closer than natural inputs."""
    note += "; below .5 means closer"
    return scored(name, PART, "black", probes, natural, _TOLERANCE, note, two_sided=True)


def _sequence(asked: Tensor, users: Tensor, gaps: dict[str, NDArray[np.float64]]) -> list[Detector]:
    """Distances to earlier queries, their normality over a window (what PRADA tests), and duplicates."""
    found = []
    if min(len(v) for v in gaps.values()) >= 3:
        note = "to the nearest earlier query of the same answer"
        found.append(_distance("distance to earlier queries", gaps["probes"], gaps["other users"], note))
        found.append(_prada(*(gaps[name][:_WINDOW] for name in ("probes", "other users"))))
    twice, usual = (1 - len(torch.unique(t.flatten(1), dim=0)) / len(t) for t in (asked, users))
    found.append(
        Detector("share of exact duplicates", PART, "black", usual, usual, 0.01, twice > usual + 0.01, twice,
                 usual, twice - usual)
    )  # fmt: skip
    return found


def _prada(probes: NDArray[np.float64], natural: NDArray[np.float64]) -> Detector:
    """Shapiro and Wilk's W of both sequences' distances, resampled."""
    coin = np.random.default_rng(0)
    w, v = (
        np.array([_normality(d), *(_normality(coin.choice(d, len(d))) for _ in range(200))])
        for d in (probes, natural)
    )
    effect, z = float(w[0] - v[0]), float((w[0] - v[0]) / max((w[1:] - v[1:]).std(), 1e-9))
    low, high = (float(v[0] + s * Z95 * v[1:].std()) for s in (-1, 1))
    note = f"Shapiro-Wilk over {_WINDOW} queries; PRADA warns below about .9"
    return Detector(
        "normality of distances (PRADA's W)", PART, "black", low, high, _TOLERANCE,
        effect < -_TOLERANCE and z < -STRIKING_Z, float(w[0]), float(v[0]), effect, z, note=note,
    )  # fmt: skip


def _normality(values: NDArray[np.float64]) -> float:
    return float(stats.shapiro(values).statistic) if np.ptp(values) > 0 else 0.0


def _classified(
    known: NDArray[np.float64], users: NDArray[np.float64], learnt: NDArray[np.float64],
    single: NDArray[np.float64],
) -> list[Detector]:  # fmt: skip
    train = np.concatenate([known, learnt])
    is_probe = np.arange(len(train)) >= len(known)
    scores = discriminant(train, is_probe, np.concatenate([users, single]))
    note = "classifier on statistics of single inputs, taught with another key's probes"
    return [scored("looks of single inputs", PART, "black", scores[len(users) :], scores[: len(users)],
                   _TOLERANCE, note)]  # fmt: skip


def statistic_names(spec: ModelSpec) -> tuple[str, ...]:
    """What :func:`describe` gives, in its order."""
    if spec.domain == "vector":
        return ("mean", "spread", "kurtosis", "largest")
    return ("mean", "spread", "high frequencies", "total variation", "noise level", "saturation")


def describe(x: Tensor, spec: ModelSpec) -> NDArray[np.float64]:
    """Statistics (n, f) of inputs (n, *shape); of images along both axes, of signals along time."""
    flat = x.double().flatten(1)
    spread = flat.std(1).clamp_min(1e-9)
    if spec.domain == "vector":
        unit = (flat - flat.mean(1, keepdim=True)) / spread[:, None]
        return torch.stack([flat.mean(1), spread, (unit**4).mean(1), flat.abs().amax(1)], 1).numpy()
    axes = (-1, -2) if spec.domain == "image" else (-1,)
    steps = [x.double().diff(dim=a).flatten(1) for a in axes]
    bends = [x.double().diff(n=2, dim=a).flatten(1) for a in axes]
    bend = torch.cat(bends, 1)
    low = float(flat.min()) if spec.low is None else spec.low
    high = float(flat.max()) if spec.high is None else spec.high
    edge = 1e-6 * (high - low)
    found = [
        flat.mean(1),
        spread,
        (bend.square().mean(1).sqrt() / spread).clamp_min(1e-9).log(),
        torch.cat(steps, 1).abs().mean(1),
        bend.abs().median(1).values,
        ((flat <= low + edge) | (flat >= high - edge)).double().mean(1),
    ]
    return torch.stack(found, 1).numpy()
