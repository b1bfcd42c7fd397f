"""The routed FFN on the CPU: each chosen expert's weights are read once, and rows are gathered, never weights.

Packed experts go through :mod:`kernels.native` in one call. Where that does not serve (several threads, another machine,
plain weights), rows are sorted by expert and each expert's stay in cache from one product to the next.
"""

from __future__ import annotations

import torch

from kernels import native
from kernels.dense_ffn.cpu import dense_ffn
from kernels.moe_ffn.weights import ExpertWeights, PackedExperts
from kernels.router.reference import sort_by_expert


def moe_ffn(
    x: torch.Tensor,
    weights: ExpertWeights | PackedExperts,
    topk_weights: torch.Tensor,
    topk_experts: torch.Tensor,
) -> torch.Tensor:
    """See :func:`kernels.moe_ffn.moe_ffn`."""
    if isinstance(weights, PackedExperts):
        gate_up, down = weights.gate_up[0].shape, weights.down[0].shape
        if native.serves(x.dtype, gate_up, down):
            addresses = weights.gate_up_addresses, weights.down_addresses
            return native.routed_ffn(x, *addresses, down[1], topk_weights, topk_experts)
    return _by_expert(x, weights, topk_weights.to(x.dtype), topk_experts)


def _by_expert(
    x: torch.Tensor,
    weights: ExpertWeights | PackedExperts,
    topk_weights: torch.Tensor,
    topk_experts: torch.Tensor,
) -> torch.Tensor:
    order, offsets = sort_by_expert(topk_experts, len(weights.gate_up))
    rows = order.div(topk_experts.shape[1], rounding_mode="floor")
    factor = topk_weights.flatten().index_select(0, order).unsqueeze(1)
    counts = offsets.diff().tolist()
    out = torch.zeros_like(x)
    for expert, (mine, scale) in enumerate(zip(rows.split(counts), factor.split(counts), strict=True)):
        if mine.numel():
            result = dense_ffn(x.index_select(0, mine), weights.gate_up[expert], weights.down[expert])
            out.index_add_(0, mine, result.mul_(scale))
    return out
