"""Fixtures and settings for every test."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import settings

torch.set_num_threads(1)  # the networks are tiny: threads would cost more than they give
settings.register_profile("ci", deadline=None, derandomize=True)
settings.load_profile("ci")

# What an interrupted run keeps belongs to the user, and to no test.
os.environ["XDG_STATE_HOME"] = tempfile.mkdtemp(prefix="gradmark-tests-")

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository."""
    return ROOT


@pytest.fixture(scope="session")
def shared() -> Path:
    """Networks and data made by others: GRADMARK_SHARED, or ``shared`` beside the repository."""
    folder = Path(os.environ.get("GRADMARK_SHARED") or ROOT.parent / "shared")
    if not folder.is_dir():
        pytest.skip("no shared networks and data here: set GRADMARK_SHARED to their folder")
    return folder
