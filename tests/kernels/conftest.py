"""Runs the Triton kernels on a GPU where there is one and under Triton's interpreter everywhere else.

The interpreter must be chosen before Triton is first imported, so it is chosen here, at import. Nothing else in the suite
computes with Triton, so nothing else changes; the tests that compile for real cards do so in a process of their own.
"""

from __future__ import annotations

import importlib.util
import os
import sys

import pytest

os.environ.setdefault("CUDA_MODULE_LOADING", "EAGER")  # nothing may load beside a resident kernel

import torch

HAS_CUDA = torch.cuda.is_available()
if not HAS_CUDA:
    os.environ["TRITON_INTERPRET"] = "1"

TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 1.2e-2}  # of ||actual - expected|| / ||expected||


def _interpreting() -> bool:
    if "triton" not in sys.modules:
        return True
    from triton.runtime.interpreter import InterpretedFunction

    return isinstance(sys.modules["triton"].language.sum, InterpretedFunction)


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where kernels run: CUDA, or the CPU under the interpreter."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("Triton is not installed")
    if not HAS_CUDA and not _interpreting():
        pytest.fail("Triton was imported before tests/kernels/conftest.py: set TRITON_INTERPRET=1 for the whole run")
    return torch.device("cuda" if HAS_CUDA else "cpu")


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def dtype(request) -> torch.dtype:
    return request.param


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def check():
    """`check("name", actual, expected)`: same shape, dtype, finite where expected is, close in norm; names what is not."""

    def compare(name: str, actual: torch.Tensor, expected: torch.Tensor, tolerance: float | None = None) -> None:
        assert actual.shape == expected.shape, f"{name}: shape {tuple(actual.shape)}, not {tuple(expected.shape)}"
        assert actual.dtype == expected.dtype, f"{name}: {actual.dtype}, not {expected.dtype}"
        if not expected.is_floating_point():
            wrong = (actual != expected).nonzero()
            assert not len(wrong), f"{name}: {len(wrong)} elements differ, first at {wrong[0].tolist()}"
            return
        gap = (actual.double() - expected.double()).abs()
        relative = float(gap.norm() / expected.double().norm().clamp_min(1e-30))
        limit = TOLERANCE[expected.dtype] if tolerance is None else tolerance
        worst = [int(i) for i in torch.unravel_index(gap.nan_to_num(float("inf")).argmax(), gap.shape)]
        assert relative < limit, f"{name}: relative error {relative:.2e} (limit {limit:.0e}), worst at {worst}"

    return compare
