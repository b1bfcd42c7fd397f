"""One layer of multi-head or grouped-query attention over a contiguous KV run a sequence."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from kernels.linear import linear, pack
from serving.layers.batch import BatchLayout
from serving.layers.norm import rms_norm
from serving.layers.rope import rotate_
from serving.spec import ModelSpec


class GQALayer:
    """Q, K and V in one packed product; the query heads that share a KV head are rows of one attention call, so no key is
    ever expanded or gathered."""

    def __init__(self, spec: ModelSpec, tensors: dict[str, torch.Tensor], dtype: torch.dtype) -> None:
        self._spec, self._attention = spec, spec.attention
        self._qkv = pack(torch.cat([tensors[role] for role in ("q", "k", "v")]).to(dtype))
        self._o = pack(tensors["o"].to(dtype))
        self._qk_norm: tuple[torch.Tensor, torch.Tensor] | None = None
        if spec.attention.qk_norm:
            self._qk_norm = (tensors["q_norm"].to(dtype, copy=True), tensors["k_norm"].to(dtype, copy=True))

    def forward(self, x: torch.Tensor, cache: torch.Tensor, layout: BatchLayout) -> torch.Tensor:
        """Attention of `x` [T, D]; K and V of the rows are written to `cache` [slots, 2, KH, d] first. Result [T, D]."""
        attention = self._attention
        heads, kv_heads, dim = attention.num_heads, attention.num_kv_heads, attention.head_dim
        rows = x.shape[0]
        qkv = linear(x, self._qkv)  # [T, (H + 2 KH) d]
        qk = qkv[:, : (heads + kv_heads) * dim].view(rows, heads + kv_heads, dim)
        if self._qk_norm is not None:
            q_weight, k_weight = self._qk_norm
            qk[:, :heads] = rms_norm(qk[:, :heads], q_weight, self._spec.norm_eps)
            qk[:, heads:] = rms_norm(qk[:, heads:], k_weight, self._spec.norm_eps)
        rotate_(qk, *layout.rope, self._spec.rope.interleaved)
        cache.index_copy_(0, layout.slots, qkv[:, heads * dim :].view(rows, 2, kv_heads, dim))
        out = torch.empty(rows, heads * dim, dtype=x.dtype)
        row = 0
        for count, length, start in zip(layout.query_lens, layout.kv_lens, layout.run_starts, strict=True):
            run = cache[start : start + length]  # [length, 2, KH, d]
            key, value = run.select(1, 0).transpose(0, 1), run.select(1, 1).transpose(0, 1)  # [KH, length, d]
            query = qk[row : row + count, :heads].view(count, kv_heads, heads // kv_heads, dim)
            if count == 1:
                query = query.view(kv_heads, heads // kv_heads, dim)  # [KH, G, d]
                attended = _attend(query, key, value, None, attention.softmax_scale)
                out[row] = attended.reshape(heads * dim)
            else:
                query = query.permute(1, 2, 0, 3).reshape(kv_heads, -1, dim)  # [KH, G n, d]
                mask = causal_mask(count, length, x.dtype).repeat(heads // kv_heads, 1)  # [G n, length]
                attended = _attend(query, key, value, mask, attention.softmax_scale)
                attended = attended.view(heads, count, dim).transpose(0, 1)  # [n, H, d]
                out[row : row + count] = attended.reshape(count, heads * dim)
            row += count
        return linear(out, self._o)


def _attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, scale: float
) -> torch.Tensor:
    """Attention of `query` [KH, n, d] over `key`, `value` [KH, length, d]: [KH, n, d]."""
    mask = None if mask is None else mask[None, None]
    return F.scaled_dot_product_attention(query[None], key[None], value[None], attn_mask=mask, scale=scale)[0]


def causal_mask(rows: int, length: int, dtype: torch.dtype) -> torch.Tensor:
    """[rows, length]: 0 where row i, token `length - rows + i` of its sequence, may look, -inf where it may not."""
    mask = torch.full((rows, length), float("-inf"), dtype=dtype)
    return mask.triu_(length - rows + 1)
