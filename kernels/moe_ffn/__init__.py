"""The routed FFN: gate, up and SiLU of the chosen experts, down, and the weighted sum over a token's choices."""

from __future__ import annotations

import torch

from kernels.dispatch import cuda_form
from kernels.moe_ffn import cpu as host_form
from kernels.moe_ffn.weights import ExpertWeights, PackedExperts

__all__ = ["ExpertWeights", "PackedExperts", "moe_ffn"]


def moe_ffn(
    x: torch.Tensor,
    weights: ExpertWeights | PackedExperts,
    topk_weights: torch.Tensor,
    topk_experts: torch.Tensor,
) -> torch.Tensor:
    """sum_j w_j * down_e (silu(gate_e x) * (up_e x)) over each token's k choices. `x` [T, D], `topk_weights` [T, k]
    float32 and `topk_experts` [T, k] int64 as :func:`kernels.router.route` gives them; result [T, D] in x's dtype."""
    form = cuda_form(__name__) if x.is_cuda else host_form
    return form.moe_ffn(x, weights, topk_weights, topk_experts)
