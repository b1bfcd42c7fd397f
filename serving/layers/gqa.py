"""One layer of multi-head or grouped-query attention over a contiguous KV run a sequence."""

from __future__ import annotations

import torch

from kernels.attention import decode_gqa, prefill_gqa
from kernels.linear import linear, pack
from kernels.rms_norm import rms_norm
from kernels.rope.cpu import adjacent_pairs, rotate_pairs_
from serving.layers.batch import BatchLayout
from serving.layers.keep import KeepOne
from serving.spec import ModelSpec


class GQALayer:
    """Q, K and V are one packed product. Channels of Q and K are kept with rotary pairs side by side, in the cache too."""

    def __init__(self, spec: ModelSpec, tensors: dict[str, torch.Tensor], dtype: torch.dtype, keep: KeepOne) -> None:
        self._attention, self._eps = spec.attention, spec.norm_eps

        def paired(role: str) -> torch.Tensor:
            tensor = tensors[role].to(dtype)
            return tensor if spec.rope.interleaved else adjacent_pairs(tensor, spec.attention.head_dim)

        self._qkv = keep(pack(torch.cat([paired("q"), paired("k"), tensors["v"].to(dtype)])))
        self._o = keep(pack(tensors["o"].to(dtype)))
        self._qk_norm: tuple[torch.Tensor, torch.Tensor] | None = None
        if spec.attention.qk_norm:
            self._qk_norm = (keep(paired("q_norm").clone()), keep(paired("k_norm").clone()))

    def forward(self, x: torch.Tensor, cache: torch.Tensor, layout: BatchLayout) -> torch.Tensor:
        """Attention of `x` [T, D]; K and V of the rows are written to `cache` [slots, 2, KH, d] first. Result [T, D]."""
        attention = self._attention
        heads, kv_heads, dim = attention.num_heads, attention.num_kv_heads, attention.head_dim
        rows = x.shape[0]
        qkv = linear(x, self._qkv).view(rows, -1, dim)  # [T, H + 2 KH, d]
        if self._qk_norm is not None:
            q_weight, k_weight = self._qk_norm
            qkv[:, :heads] = rms_norm(qkv[:, :heads], q_weight, self._eps)
            qkv[:, heads : heads + kv_heads] = rms_norm(qkv[:, heads : heads + kv_heads], k_weight, self._eps)
        rotate_pairs_(qkv[:, : heads + kv_heads], layout.turns)
        cache.index_copy_(0, layout.slots, qkv[:, heads:].view(rows, 2, kv_heads, dim))
        queries, kv = qkv[:, :heads], layout.runs(cache)
        if layout.decode_only:
            out = decode_gqa(queries, kv, attention.softmax_scale)
        else:
            out = prefill_gqa(queries, kv, layout.query_lens, attention.softmax_scale)
        return linear(out.view(rows, -1), self._o)
