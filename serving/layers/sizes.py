"""Bytes that the two halves hold once loaded, from the spec alone, so that a plan can charge them before anything loads."""

from __future__ import annotations

from collections.abc import Collection

import torch

from kernels.linear import packed_bytes
from serving.spec import MLASpec, ModelSpec


def weight_bytes_attention(spec: ModelSpec, dtype: str) -> int:
    """Packed projections, norms, embedding and head. A tied head is packed beside the embedding it equals."""
    kind = getattr(torch, dtype)
    attention, hidden = spec.attention, spec.hidden_size
    vectors = 2 * hidden
    if isinstance(attention, MLASpec):
        latent = attention.kv_rank + attention.rope_dim
        query = attention.num_heads * attention.qk_dim
        first = query if attention.q_rank is None else attention.q_rank
        layer = packed_bytes(first + latent, hidden, kind)
        if attention.q_rank is not None:
            layer += packed_bytes(query, attention.q_rank, kind)
            vectors += attention.q_rank
        vectors += attention.kv_rank
        expand = attention.num_heads * (attention.nope_dim + attention.value_dim) * attention.kv_rank
        layer += expand * kind.itemsize + packed_bytes(hidden, attention.num_heads * attention.value_dim, kind)
    else:
        heads, dim = attention.num_heads, attention.head_dim
        layer = packed_bytes((heads + 2 * attention.num_kv_heads) * dim, hidden, kind)
        layer += packed_bytes(hidden, heads * dim, kind)
        vectors += 2 * dim if attention.qk_norm else 0
    layer += vectors * kind.itemsize
    ends = (spec.vocab_size + 1) * hidden * kind.itemsize + packed_bytes(spec.vocab_size, hidden, kind)
    return spec.num_layers * layer + ends


def weight_bytes_ffn(spec: ModelSpec, dtype: str, layers: Collection[int] | None = None) -> int:
    """Packed experts, shared experts and dense layers, and routers in float32, of `layers` (None: all)."""
    kind = getattr(torch, dtype)

    def ffn(width: int) -> int:
        return packed_bytes(2 * width, spec.hidden_size, kind) + packed_bytes(spec.hidden_size, width, kind)

    moe = spec.moe
    biases = 1 if moe.routing == "sigmoid_bias" else 0
    routed = moe.num_experts * (ffn(moe.expert_width) + 4 * (spec.hidden_size + biases))
    routed += ffn(moe.shared_width) if moe.shared_width else 0
    held = range(spec.num_layers) if layers is None else layers
    return sum(ffn(spec.dense_width) if spec.is_dense(layer) else routed for layer in held)
