"""Fixtures that several parts of the suite share."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch

# Triton decides at its first import whether kernels compile or are interpreted, and `transformers` imports it: so here,
# before any test module. Nothing but tests/kernels computes with it; those who compile do so in a process of their own.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
os.environ.setdefault("CUDA_MODULE_LOADING", "EAGER")  # on a card, nothing may load beside a resident kernel

sys.path.insert(0, str(Path(__file__).parent))  # judges.py and reference_deepseek.py


@pytest.fixture(scope="session")
def tiny_checkpoints(tmp_path_factory) -> dict[str, Path]:
    """A tiny checkpoint of every architecture, by architecture, made once a session."""
    from serving.checkpoints.make import make_checkpoint
    from serving.spec import ARCHITECTURES

    root = tmp_path_factory.mktemp("checkpoints")
    return {name: make_checkpoint(name, "tiny", root / name, seed=1, progress=False) for name in ARCHITECTURES}
