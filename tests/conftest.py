"""Fixtures that several parts of the suite share."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:  # one of several processes of a suite: a thread each, in children too
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from hypothesis import HealthCheck, settings

# Triton decides at its first import whether kernels compile or are interpreted, and `transformers` imports it: so here,
# before any test module. Nothing but tests/kernels computes with it; those who compile do so in a process of their own.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
os.environ.setdefault("CUDA_MODULE_LOADING", "EAGER")  # on a card, nothing may load beside a resident kernel

sys.path.insert(0, str(Path(__file__).parent))  # judges.py and reference_deepseek.py

# Who waits for a core has not become slow.
settings.register_profile("beside others", deadline=None, suppress_health_check=[HealthCheck.too_slow])
if "PYTEST_XDIST_WORKER" in os.environ:
    settings.load_profile("beside others")


# Of `-n`: tests that share what takes long to make, or begin first because they take long. Each of the others is for
# whichever process is free.
TOGETHER = (
    "tests/test_documents.py::test_every_block",
    "tests/runner/test_launchers.py::test_ray_runs",
    "tests/baselines/test_static_groups.py",
    "tests/kernels/test_aot.py",
)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    from xdist.scheduler import LoadScopeScheduling

    class Scheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return next((start for start in TOGETHER if nodeid.startswith(start)), nodeid)

    return Scheduling(config, log)


@pytest.fixture(scope="session", autouse=True)
def warm_workers():
    """Workers that tests start themselves are forked from a process that has imported what they need; not where there are
    cards, whose drivers do not outlive a fork."""
    from warm_workers import PARENT

    from serving.workers import process

    with pytest.MonkeyPatch.context() as patch:
        if not torch.cuda.is_available():
            patch.setattr(process, "launch", PARENT.launch)
        yield PARENT
        PARENT.stop()


@pytest.fixture(scope="session")
def tiny_checkpoints(tmp_path_factory, warm_workers) -> dict[str, Path]:
    """A tiny checkpoint of every architecture, by architecture, made once a session. Whoever serves them needs workers."""
    from serving.checkpoints.make import make_checkpoint
    from serving.spec import ARCHITECTURES

    if not torch.cuda.is_available():
        warm_workers.start()  # imports while checkpoints are made, and is there before anybody counts descriptors
    root = tmp_path_factory.mktemp("checkpoints")
    return {name: make_checkpoint(name, "tiny", root / name, seed=1, progress=False) for name in ARCHITECTURES}
