"""RMSNorm, alone or fused with the residual addition before it."""

from __future__ import annotations

import torch

from kernels.dispatch import cuda_form
from kernels.rms_norm import cpu as host_form


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """`x` [T, D] normalised over D, times `weight` [D]; result [T, D] in x's dtype."""
    return (cuda_form(__name__) if x.is_cuda else host_form).rms_norm(x, weight, eps)


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """`x + residual`, normalised and not: (normed [T, D], sum [T, D])."""
    return (cuda_form(__name__) if x.is_cuda else host_form).add_rms_norm(x, residual, weight, eps)
