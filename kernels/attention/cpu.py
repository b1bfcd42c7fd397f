"""Attention on the CPU: torch's fused kernel straight over each sequence's run of slots.

Query heads that share a KV head are a dimension of their own, over which keys and values are broadcast as views: nothing
is gathered or expanded, and no score leaves the fused kernel's cache blocks.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.nn.functional import scaled_dot_product_attention

from kernels.paged_kv import PagedKV, sequence_tokens


def decode_gqa(q: torch.Tensor, kv: PagedKV, scale: float) -> torch.Tensor:
    """See :func:`kernels.attention.decode_gqa`."""
    batch, heads, dim = q.shape
    kv_heads = kv.cache.shape[2]
    # The batch of the fused kernel is the KV heads: its output is then already in the order of the query heads.
    queries = q.view(batch, kv_heads, 1, heads // kv_heads, dim).unbind(0)
    pairs = _runs(kv) if kv.run_starts else (_keys_and_values(kv, sequence) for sequence in range(batch))
    parts = [
        scaled_dot_product_attention(query, keys, values, scale=scale)  # [KH, 1, G, d]
        for query, (keys, values) in zip(queries, pairs, strict=True)
    ]
    return (parts[0] if batch == 1 else torch.cat(parts)).view(batch, heads, dim)


def prefill_gqa(q: torch.Tensor, kv: PagedKV, query_lens: tuple[int, ...], scale: float) -> torch.Tensor:
    """See :func:`kernels.attention.prefill_gqa`."""
    rows, heads, dim = q.shape
    kv_heads = kv.cache.shape[2]
    queries = q.view(rows, kv_heads, heads // kv_heads, dim)
    out = torch.empty(rows, kv_heads, heads // kv_heads, dim, dtype=q.dtype)
    start = 0
    for sequence, count in enumerate(query_lens):
        mine = slice(start, start + count)
        query = queries[mine].permute(1, 2, 0, 3)  # [KH, G, n, d]
        keys, values = (part.expand(-1, heads // kv_heads, -1, -1) for part in _keys_and_values(kv, sequence))
        attended = causal_attention(query, keys, values, scale)  # [KH, G, n, d]
        out[mine] = attended.permute(2, 0, 1, 3)
        start += count
    return out.view(rows, heads, dim)


def causal_attention(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float) -> torch.Tensor:
    """Fused attention of `query` [.., .., n, d], the last n tokens of `keys` and `values` [.., .., L, d]."""
    rows, length = query.shape[2], keys.shape[2]
    if rows == 1:
        return scaled_dot_product_attention(query, keys, values, scale=scale)
    if rows == length:
        return scaled_dot_product_attention(query, keys, values, is_causal=True, scale=scale)
    unseen = torch.full((rows, length), float("-inf"), dtype=query.dtype).triu_(length - rows + 1)
    return scaled_dot_product_attention(query, keys, values, attn_mask=unseen, scale=scale)


def _keys_and_values(kv: PagedKV, sequence: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values of one sequence, [KH, 1, L, d] each; views where the sequence is one run of slots."""
    return sequence_tokens(kv, sequence).permute(1, 2, 0, 3).unsqueeze(2).unbind(0)


def _runs(kv: PagedKV) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """:func:`_keys_and_values` of every sequence, with two views each: at decode, views are a third of the time."""
    keys, values = kv.cache.permute(1, 2, 0, 3).unsqueeze(2).unbind(0)  # [KH, 1, S, d]
    for start, length in zip(kv.run_starts, kv.run_lens, strict=True):
        yield keys.narrow(2, start, length), values.narrow(2, start, length)
