"""The routed FFN in plain torch: one expert after another over the rows that chose it, float32 throughout."""

from __future__ import annotations

import torch

from kernels.dense_ffn.reference import swiglu
from kernels.moe_ffn.weights import ExpertWeights


def moe_ffn(
    x: torch.Tensor, weights: ExpertWeights, topk_weights: torch.Tensor, topk_experts: torch.Tensor
) -> torch.Tensor:
    """See :func:`kernels.moe_ffn.moe_ffn`."""
    output = torch.zeros(x.shape, dtype=torch.float32, device=x.device)  # [T, D]
    for expert in topk_experts.unique().tolist():
        rows, choice = (topk_experts == expert).nonzero(as_tuple=True)  # each [n]
        hidden = swiglu(x[rows].float(), weights.gate_up[expert].float(), weights.down[expert].float())  # [n, D]
        output.index_add_(0, rows, hidden * topk_weights[rows, choice].float().unsqueeze(1))
    return output.to(x.dtype)
