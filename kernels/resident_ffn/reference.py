"""One FFN layer as the resident executor computes it, in plain torch: router, routed experts, shared experts."""

from __future__ import annotations

import torch

from kernels.dense_ffn.reference import dense_ffn
from kernels.moe_ffn.reference import moe_ffn
from kernels.resident_ffn.layers import FFNLayer
from kernels.router.reference import route


def ffn_layer(layer: FFNLayer, x: torch.Tensor) -> torch.Tensor:
    """`x` [T, D] through the layer; result [T, D] in x's dtype, summed in float32 and rounded once."""
    wide = x.float()
    output = torch.zeros_like(wide)
    if layer.experts is not None:
        logits = wide @ layer.router.float().T  # [T, E]
        rule = (layer.rule, layer.bias, layer.routed_scale, layer.num_groups, layer.top_groups)
        output += moe_ffn(wide, layer.experts, *route(logits, layer.top_k, *rule))
    if layer.shared_down is not None:
        output += dense_ffn(wide, layer.shared_gate_up, layer.shared_down)
    return output.to(x.dtype)
