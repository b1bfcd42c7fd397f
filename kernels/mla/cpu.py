"""Absorbed latent attention on the CPU: torch's fused kernel, with the cache's rows as both keys and values.

The last channels of an output row, the rope channels weighted as if they were values, are dropped: that work, a tenth to a
fifth, is less than what a kernel without fusion spends on scores.
"""

from __future__ import annotations

import torch

from kernels.attention.cpu import causal_attention
from kernels.paged_kv import PagedKV, sequence_tokens


def decode_mla(q_latent: torch.Tensor, q_rope: torch.Tensor, kv: PagedKV, scale: float) -> torch.Tensor:
    """See :func:`kernels.mla.decode_mla`."""
    return prefill_mla(q_latent, q_rope, kv, (1,) * q_latent.shape[0], scale)


def prefill_mla(
    q_latent: torch.Tensor, q_rope: torch.Tensor, kv: PagedKV, query_lens: tuple[int, ...], scale: float
) -> torch.Tensor:
    """See :func:`kernels.mla.prefill_mla`."""
    queries = torch.cat((q_latent, q_rope), dim=-1)  # [T, H, rank + r]
    heads = queries.shape[1]
    parts = []
    for sequence, rows in enumerate(queries.split(query_lens)):
        entries = sequence_tokens(kv, sequence)[None, None]  # [1, 1, L, rank + r]
        if rows.shape[0] == 1:  # heads are the rows of one product
            parts.append(causal_attention_of_heads(rows, entries, scale))
        else:
            entries = entries.expand(1, heads, -1, -1)
            attended = causal_attention(rows.transpose(0, 1)[None], entries, entries, scale)  # [1, H, n, rank + r]
            parts.append(attended[0].transpose(0, 1))
    joined = parts[0] if len(parts) == 1 else torch.cat(parts)
    return joined[..., : q_latent.shape[-1]]


def causal_attention_of_heads(query: torch.Tensor, entries: torch.Tensor, scale: float) -> torch.Tensor:
    """One token's `query` [1, H, w] over all `entries` [1, 1, L, w]: [1, H, w]."""
    return torch.nn.functional.scaled_dot_product_attention(query[None], entries, entries, scale=scale)[0]
