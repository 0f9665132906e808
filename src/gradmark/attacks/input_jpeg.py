"""An API that compresses every image as JPEG before the model sees it (Das et al. 2017)."""

from __future__ import annotations

import io
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from gradmark.errors import AttackError
from gradmark.guards import Guard, axes, bounds, straight_through
from gradmark.protocols import Thief


@dataclass(frozen=True)
class InputJpeg:
    """JPEG at ``quality`` (1 to 95) and back; the gradient passes as if nothing had happened.

    Raises AttackError where inputs aren't images of one or three channels with bounds, or where Pillow
    isn't installed.
    """

    quality: int = 75

    name = "input-jpeg"

    def run(self, model: nn.Module, thief: Thief, generator: torch.Generator) -> nn.Module:
        axes(thief, self.name, "image")
        if thief.spec.input_shape[0] not in (1, 3) or thief.spec.low is None or thief.spec.high is None:
            raise AttackError(
                "JPEG holds grey or colour images",
                expected="1 or 3 channels, and bounds",
                found=f"{thief.spec.input_shape} in {thief.spec.low} to {thief.spec.high}",
            )
        try:
            from PIL import Image
        except ImportError as cause:
            raise AttackError("JPEG needs Pillow", fix="pip install pillow") from cause
        low, high = bounds(thief)

        def one(image: Tensor) -> Tensor:
            """One image (channels, height, width) of bytes, there and back."""
            grey = image.shape[0] == 1
            data = io.BytesIO()
            picture = Image.fromarray(image[0].numpy() if grey else image.permute(1, 2, 0).numpy())
            picture.save(data, "JPEG", quality=self.quality)
            back = torch.from_numpy(np.array(Image.open(data)))
            return back[None] if grey else back.permute(2, 0, 1)

        def before(x: Tensor, noise: torch.Generator) -> Tensor:
            levels = (x.detach().float().cpu().clamp(low, high) - low) / (high - low) * 255
            coded = torch.stack([one(image) for image in levels.round().to(torch.uint8)])
            return straight_through((coded.double() / 255 * (high - low) + low).to(x), x)

        return Guard(model, generator, before=before)
