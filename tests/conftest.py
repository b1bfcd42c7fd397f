"""Fixtures that several parts of the suite share."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # judges.py and reference_deepseek.py


@pytest.fixture(scope="session")
def tiny_checkpoints(tmp_path_factory) -> dict[str, Path]:
    """A tiny checkpoint of every architecture, by architecture, made once a session."""
    from serving.checkpoints.make import make_checkpoint
    from serving.spec import ARCHITECTURES

    root = tmp_path_factory.mktemp("checkpoints")
    return {name: make_checkpoint(name, "tiny", root / name, seed=1, progress=False) for name in ARCHITECTURES}
