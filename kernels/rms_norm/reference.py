"""RMSNorm in plain torch, with the rounding of `transformers`: normalise in float32, cast, then multiply by the weight."""

from __future__ import annotations

import torch


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """`x` [T, D] normalised over D (arXiv 1910.07467, eq. 4), times `weight` [D]; result [T, D] in x's dtype."""
    wide = x.float()
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)  # [T, D]
    return weight * normed.to(x.dtype)


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """`x + residual`, normalised and not: (normed [T, D], sum [T, D])."""
    total = x + residual
    return rms_norm(total, weight, eps), total
