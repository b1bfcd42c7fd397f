"""Runs the Triton kernels on a GPU where there is one and under Triton's interpreter everywhere else.

Which of the two is decided in tests/conftest.py, before anything imports Triton.
"""

from __future__ import annotations

import importlib.util

import pytest
import torch

TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 1.2e-2}  # of ||actual - expected|| / ||expected||


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where kernels run: CUDA, or the CPU under the interpreter."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("Triton is not installed")
    if torch.cuda.is_available():
        return torch.device("cuda", 0)
    import triton.language as tl
    from triton.runtime.interpreter import InterpretedFunction

    assert isinstance(tl.sum, InterpretedFunction), "Triton was imported before tests/conftest.py chose the interpreter"
    return torch.device("cpu")


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
