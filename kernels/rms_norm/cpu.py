"""RMSNorm on the CPU in as few operations as torch allows; the rounding is that of `transformers`.

One reduction gives the root of the sum of squares, and what is done to it is done to one number a row;
`torch.nn.functional.rms_norm` takes twice the time at decode's sizes.
"""

from __future__ import annotations

import functools
import math

import torch


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """See :func:`kernels.rms_norm.rms_norm`; here `x` may have more leading dimensions."""
    width = x.shape[-1]
    root = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)  # sqrt(sum x^2)
    root.hypot_(_constant(math.sqrt(width * eps))).mul_(width**-0.5)  # sqrt(mean x^2 + eps)
    normed = x.div(root)  # float32, as root is
    return (normed if x.dtype == torch.float32 else normed.to(x.dtype)).mul_(weight)


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """See :func:`kernels.rms_norm.add_rms_norm`."""
    total = x + residual
    return rms_norm(total, weight, eps), total


@functools.cache
def _constant(value: float) -> torch.Tensor:
    return torch.tensor(value)
