"""A marker's state beside somebody else's checkpoint, so that a resumed training goes on as it would have."""

from __future__ import annotations

import io
from pathlib import Path

import torch

from gradmark.embed import Marker
from gradmark.errors import ResumeError
from gradmark.files import atomic_write
from gradmark.suspects.checks import brief

NAME = "gradmark.pt"


def save_marker(marker: Marker, folder: Path) -> Path:
    """Write ``folder/gradmark.pt``: running means and numbers, no secret of the key."""
    buffer = io.BytesIO()
    torch.save(marker.state_dict(), buffer)
    path = folder / NAME
    atomic_write(path, buffer.getvalue(), overwrite=True)
    return path


def load_marker(marker: Marker, folder: Path) -> None:
    """Take up what :func:`save_marker` wrote. ResumeError where it is missing, damaged or another's."""
    path = folder / NAME
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        own = marker.state_dict()
        same = state["readings"].shape == own["readings"].shape
        same &= all((state[name] is None) == (own[name] is None) for name in ("head", "rehearsal"))
    except Exception as cause:  # torch raises many kinds on damaged files
        raise ResumeError(
            "The marker's state can't be read", expected=NAME, found=brief(cause), fix="start afresh"
        ) from cause
    if not same:
        raise ResumeError(
            "The marker's state is of another mark, or of a marker with other settings", found=str(path)
        )
    marker.load_state_dict(state)
