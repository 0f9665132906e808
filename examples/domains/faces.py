"""Sign a face recogniser, and prove it through an API that gives points and one that compares pairs.

    python examples/domains/faces.py [PICTURE.png]

With the ORL faces (GRADMARK_SHARED) if they are there, else with drawn ones.
"""

from __future__ import annotations

import sys
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gradmark import FilterGradient, Verdict
from gradmark.data import Data, shared
from gradmark.embed import Recipe
from gradmark.errors import DataError
from gradmark.tasks.faces import PEOPLE, Faces, Similarity, split
from shared_parts import proved

SHOTS = 10


@lru_cache(maxsize=1)
def drawn(fold: int) -> Data:
    """Heads, hair, eyes, nose and mouth, placed and shaded by the person; each shot is lit and moved anew."""
    draw = torch.Generator().manual_seed(11)
    row, column = torch.meshgrid(torch.linspace(-1, 1, 28), torch.linspace(-1, 1, 23), indexing="ij")
    images = torch.empty(PEOPLE * SHOTS, 1, 28, 23)
    for i in range(PEOPLE):
        look = torch.rand(16, generator=draw)
        for s in range(SHOTS):
            dy, dx, light, turn = (0.16 * torch.rand(4, generator=draw) - 0.08).tolist()
            y, x = row + dy, column + dx

            def blob(cy: float, cx: float, h: float, w: float, y: Tensor = y, x: Tensor = x) -> Tensor:
                return torch.sigmoid(8 * (1 - ((y - cy) / h) ** 2 - ((x - cx) / w) ** 2))

            f = look.tolist()
            face = 0.25 + (0.35 + 0.3 * f[0]) * blob(0, 0, 0.75 + 0.2 * f[1], 0.55 + 0.25 * f[2])
            face = face - (0.1 + 0.4 * f[3]) * blob(
                -0.75 + 0.2 * f[4], 0, 0.25 + 0.2 * f[5], 0.5 + 0.3 * f[6]
            )
            for side in (-1, 1):
                face = face - (0.2 + 0.3 * f[7]) * blob(
                    -0.2 + 0.2 * f[8], side * (0.22 + 0.15 * f[9]) + turn, 0.08, 0.14
                )
            face = face - (0.1 + 0.3 * f[10]) * blob(0.15, turn, 0.1 + 0.15 * f[11], 0.06)
            face = face - (0.2 + 0.3 * f[12]) * blob(
                0.45 + 0.15 * f[13], turn, 0.05 + 0.05 * f[14], 0.15 + 0.2 * f[15]
            )
            images[i * SHOTS + s, 0] = face + light + 0.03 * torch.randn(face.shape, generator=draw)
    people = torch.arange(PEOPLE).repeat_interleave(SHOTS)
    return split((255 * images.clamp(0, 1)).round().to(torch.uint8), people, fold)


def draw(axes: Any, face: Tensor, nudged: Tensor) -> None:
    difference = 0.5 + 3 * (nudged - face)
    axes.imshow(torch.cat([face[0], nudged[0], difference[0]], 1).numpy(), cmap="gray", vmin=0, vmax=1)
    axes.set(xticks=[], yticks=[], title="A face, nudged, the difference (x 3)")


def main(out: Path = Path("faces.png"), *, synthetic: bool = False) -> dict[str, Verdict]:
    task = Faces(fold=7)
    try:
        shared("orl_faces.npz")
    except DataError:
        synthetic = True
    if synthetic:
        task = Faces(fold=7, load=drawn)
    apis = {"API of points": (task, lambda net: net), "API of pairs": (task.over_pairs(), Similarity)}
    recipe = Recipe(epochs=12, batch_size=60, augment="shift")
    scheme = FilterGradient(bits=64, step=0.06)
    return proved(task, scheme, recipe, out, draw, apis, carriers=40, every=1, budget=1.0, margin=0.3)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:2]))
