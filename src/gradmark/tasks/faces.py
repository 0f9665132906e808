"""Face recognition: networks that turn a face into a point, judged by the cosine of two points.

No class score exists at such an API. The scores here are cosines of a face with the faces of
``GALLERY`` enrolled people, each one image, which the suspect itself turns into points: so
they know nothing of how the points are turned, mirrored or scaled. The contrasts compare how much a
face looks like *other* people, and the mark leans on that: never on how much it looks like itself.

ORL's 40 people are split into 30 to train on and 10 whom no training saw, ``fold`` says who. Every image
is there twice, as it is and mirrored. All judgement of quality is on the 10.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradmark.data import Data, Split, shared
from gradmark.errors import DataError
from gradmark.files import read_arrays
from gradmark.protocols import Batch, ModelSpec, Utility
from gradmark.views import judging

PEOPLE, KNOWN, GALLERY = 40, 30, 10
SHRINK = 4
SCALE = 16.0
"""What a cosine counts in logits: ArcFace's usual order of magnitude."""
FALSE_ACCEPTS = 1e-3
_ARC, _TRIPLET = 0.3, 0.3  # margins: radians, cosines


class FaceNet(nn.Module):
    """Inputs (b, 1, 28, 23) in [0, 1] to points (b, 64), with ArcFace's centres of the known people."""

    def __init__(self, widths: tuple[int, ...] = (16, 32, 64), points: int = 64) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        before, (height, width) = 1, (112 // SHRINK, 92 // SHRINK)
        for i, after in enumerate(widths):
            stride = 2 if i else 1
            layers += [nn.Conv2d(before, after, 3, stride, 1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]
            before, height, width = after, -(-height // stride), -(-width // stride)
        self.body = nn.Sequential(*layers, nn.Flatten(), nn.Linear(before * height * width, points))
        self.centres = nn.Parameter(torch.randn(KNOWN, points))

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.body(2 * x - 1)
        return found


def other() -> nn.Module:
    """Wider and one layer less."""
    return FaceNet((24, 48))


class Similarity(nn.Module):
    """An API that takes pairs of faces (b, 2, 1, 28, 23) and answers with their cosine (b, 1)."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, pairs: Tensor) -> Tensor:
        a, b = self.model(pairs[:, 0]), self.model(pairs[:, 1])
        return F.cosine_similarity(a, b)[:, None]


@lru_cache(maxsize=4)
def load(fold: int) -> Data:
    """ORL's faces, by :func:`split`."""
    arrays = read_arrays(shared("orl_faces.npz"), what="ORL faces", error=DataError)
    x = F.avg_pool2d(torch.from_numpy(arrays["x"]).float()[:, None], SHRINK).round().to(torch.uint8)
    return split(x, torch.from_numpy(arrays["y"]).long(), fold)


def split(x: Tensor, y: Tensor, fold: int) -> Data:
    """Faces (n, 1, h, w) uint8 of people (n,) 0 to 39: known people become 0 to 29, the unseen 30 to 39.

    Images first, then their mirror images.
    """
    rank = torch.randperm(PEOPLE, generator=torch.Generator().manual_seed(fold)).argsort()
    y = rank[y]
    spec = ModelSpec("image", tuple(x.shape[1:]), GALLERY, 0.0, 1.0, 255)
    splits = []
    for chosen in (y < KNOWN, y >= KNOWN):
        faces, people = x[chosen], y[chosen]
        splits.append(Split(torch.cat([faces, faces.flip(3)]), torch.cat([people, people]), spec))
    return Data(splits[0], splits[1], spec)


@dataclass(frozen=True)
class Faces:
    """``fold``: who is unseen. ``objective``: what the owner trains with. ``api``: what is answered, a face's
    point (one call a face, and the gallery once) or a pair's cosine (``GALLERY`` calls a face). ``enrolled``:
    people in the gallery. ``load``: from the fold to other faces, by :func:`split`."""

    fold: int = 0
    objective: Literal["arcface", "triplet"] = "arcface"
    api: Literal["point", "similarity"] = "point"
    enrolled: int = GALLERY
    name: str = "faces"
    load: Callable[[int], Data] = load

    @property
    def price(self) -> int:
        return 1 if self.api == "point" else self.enrolled

    @property
    def entry(self) -> int:
        return self.enrolled if self.api == "point" else 0

    def over_pairs(self) -> Faces:
        """The same task where the API takes pairs."""
        return replace(self, api="similarity")

    def thiefs(self) -> Faces:
        """As a thief looks at it, who knows nothing of the gallery and enrols whom he has."""
        return replace(self, enrolled=KNOWN)

    def data(self) -> Data:
        return self.load(self.fold)

    def network(self) -> nn.Module:
        return FaceNet()

    def gallery(self) -> Tensor:
        """One face of each enrolled person, (enrolled, 1, 28, 23)."""
        train = self.data().to_train()
        first = [int((train.y == person).nonzero()[0]) for person in range(self.enrolled)]
        return train.batch(torch.tensor(first))[0]

    def scores(self, model: Callable[[Tensor], Any], x: Tensor) -> Tensor:
        gallery = self.gallery().to(x)
        if self.api == "similarity":
            b, shape = len(x), x.shape[1:]
            ones, others = (v.expand(b, self.enrolled, *shape) for v in (x[:, None], gallery))
            cosines: Tensor = model(torch.stack([ones, others], 2).flatten(0, 1))
            return SCALE * cosines.reshape(b, self.enrolled)
        if isinstance(model, nn.Module):  # together, for the sake of batch norms
            points = F.normalize(model(torch.cat([x, gallery])))
            return SCALE * points[: len(x)] @ points[len(x) :].T
        return SCALE * F.normalize(model(x)) @ F.normalize(model(gallery)).T

    def carriers(self, batch: Batch) -> Batch:
        """Every face. The enrolled person left alone is the face's own; for all others, any one will do."""
        return batch[0], batch[1] % self.enrolled

    def loss(self, model: nn.Module, batch: Batch, smoothing: float = 0.0) -> Tensor:
        """ArcFace (Deng et al., CVPR 2019), or the triplet loss on the hardest pairs of the batch (Hermans et
        al. 2017)."""
        x, people = batch
        points = F.normalize(model(x))
        if self.objective == "triplet":
            return _hardest_triplets(points, people)
        cosines = points @ F.normalize(model.get_parameter("centres")).T
        angle = cosines.clamp(-1 + 1e-6, 1 - 1e-6).acos()
        own = F.one_hot(people, KNOWN).bool()
        return F.cross_entropy(SCALE * torch.where(own, (angle + _ARC).cos(), cosines), people)

    def utility(self, model: nn.Module) -> Utility:
        """On pairs of faces of unseen people: 100 times the area under the ROC curve, and what else is asked
        of face recognition (:func:`judged`)."""
        test = self.data().test
        half = len(test) // 2
        x, people = test.batch(slice(0, half))
        with judging(model):
            points, enrolled = F.normalize(model(x)), F.normalize(model(self.gallery()))
        details = judged(points, people, enrolled)
        return Utility(100 * details["auc"], half * (half - 1) // 2, details)


def _hardest_triplets(points: Tensor, people: Tensor) -> Tensor:
    """Mean over the batch of: the unlikest of the same person must be liker than the likest other one."""
    cosines, same = points @ points.T, people[:, None] == people
    unlikest = cosines.masked_fill(~same, 2.0).amin(1)
    likest = cosines.masked_fill(same, -2.0).amax(1)
    return F.softplus(SCALE * (likest - unlikest + _TRIPLET)).mean()


def judged(points: Tensor, people: Tensor, enrolled: Tensor) -> dict[str, float]:
    """Verification and identification by unit points (n, D) of ``people`` (n,), and of strangers enrolled.

    ``auc``, ``eer``, ``tar``: of all pairs; ``tar`` is the share of genuine pairs accepted where one in a
    thousand impostor pairs is. ``worst``: the likest impostor pair's cosine. ``identified``: open-set
    identification, the share of faces of enrolled people (the first half, by their first image) found
    at rank 1 and above the cosine that one in a hundred probes of the others passes. ``strangers``:
    the likest pair of anybody with the ``enrolled`` strangers; ``strangers_far``: the share of those pairs
    that pass the threshold of ``tar``.
    """
    cosines = (points @ points.T).double()
    upper = torch.triu(torch.ones_like(cosines), 1).bool()
    same = people[:, None] == people
    genuine, impostor = cosines[upper & same], cosines[upper & ~same].sort().values
    below = torch.searchsorted(impostor, genuine) + torch.searchsorted(impostor, genuine, right=True)
    threshold = float(impostor[-1 - int(FALSE_ACCEPTS * len(impostor))])
    cuts = torch.cat([genuine, impostor])
    missed = torch.searchsorted(genuine.sort().values, cuts) / len(genuine)
    passed = 1 - torch.searchsorted(impostor, cuts) / len(impostor)
    strange = points @ enrolled.T
    return {
        "auc": float(below.double().mean() / (2 * len(impostor))),
        "eer": float(torch.maximum(missed, passed).min()),
        "tar": float((genuine > threshold).double().mean()),
        "threshold": threshold,
        "worst": float(impostor[-1]),
        "identified": _identified(cosines, people),
        "strangers": float(strange.max()),
        "strangers_far": float((strange > threshold).double().mean()),
    }


def _identified(cosines: Tensor, people: Tensor) -> float:
    """Detection and identification rate at rank 1 with one false alarm in a hundred."""
    everybody = people.unique()
    half = everybody[: len(everybody) // 2]
    first = torch.tensor([int((people == person).nonzero()[0]) for person in half.tolist()])
    probes = torch.ones(len(people), dtype=torch.bool)
    probes[first] = False
    best, place = cosines[:, first].max(1)
    known = torch.isin(people, half)
    alarms = best[~known].sort().values
    threshold = alarms[-1 - int(0.01 * len(alarms))]
    right = (half[place] == people) & (best > threshold)
    return float(right[known & probes].double().mean())
