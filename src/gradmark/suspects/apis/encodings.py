"""One input as JSON: nested lists, the base64 of its bytes, or a base64 PNG image."""

from __future__ import annotations

import base64
import io
from typing import Any

import numpy as np
from torch import Tensor

from gradmark.errors import UsageError

ENCODINGS = ("lists", "uint8", "base64-float32", "base64-float64", "base64-uint8", "png")


def encoded(x: Tensor, how: str, limits: tuple[float, float], layout: str) -> list[Any]:
    """Inputs (b, *shape) as JSON values, in the C order of ``layout`` (images: channels first, or last).

    ``uint8`` and ``png`` count from ``limits[0]`` to ``limits[1]`` in 255 steps. UsageError where a PNG
    can't hold the input.
    """
    if layout == "hwc" and x.ndim == 4:
        x = x.permute(0, 2, 3, 1)
    if how == "lists":
        found: list[Any] = x.tolist()
        return found
    array = x.contiguous().numpy()
    if how.startswith("base64-float"):
        return [
            base64.b64encode(row.astype("<f4" if how.endswith("32") else "<f8").tobytes()).decode()
            for row in array
        ]
    steps = np.rint((array.astype(np.float64) - limits[0]) / (limits[1] - limits[0]) * 255)
    levels = steps.clip(0, 255).astype(np.uint8)
    if how == "uint8":
        listed: list[Any] = levels.tolist()
        return listed
    if how == "base64-uint8":
        return [base64.b64encode(row.tobytes()).decode() for row in levels]
    if layout == "chw" and levels.ndim == 4:
        levels = levels.transpose(0, 2, 3, 1)
    return [_png(row) for row in levels]


def _png(image: np.ndarray[Any, np.dtype[np.uint8]]) -> str:
    try:
        from PIL import Image
    except ImportError as cause:
        raise UsageError("PNG images need Pillow", fix="pip install pillow") from cause
    if image.ndim == 3 and image.shape[2] == 1:
        image = image[:, :, 0]
    if image.ndim != 2 and not (image.ndim == 3 and image.shape[2] == 3):
        raise UsageError("A PNG holds grey or colour images", found=f"an input of shape {image.shape}")
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, "PNG")
    return base64.b64encode(stream.getvalue()).decode()
