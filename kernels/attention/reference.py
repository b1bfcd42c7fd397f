"""Attention over a paged KV cache in plain torch: one sequence at a time, every score held, float32 throughout."""

from __future__ import annotations

import torch

from kernels.paged_kv import PagedKV, sequence_tokens


def attend(q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float) -> torch.Tensor:
    """Causal attention of the last rows of one sequence: `q` [n, H, d] are its last n tokens of `keys` and `values`
    [L, KH, d]; query head h reads KV head h // (H / KH). Result [n, H, d] in q's dtype."""
    group = q.shape[1] // keys.shape[1]
    wide_keys = keys.float().repeat_interleave(group, dim=1)  # [L, H, d]
    wide_values = values.float().repeat_interleave(group, dim=1)  # [L, H, d]
    scores = torch.einsum("nhd,lhd->hnl", q.float(), wide_keys) * scale  # [H, n, L]
    rows, length = q.shape[0], keys.shape[0]
    token = torch.arange(length, device=q.device)
    last_seen = torch.arange(length - rows, length, device=q.device)
    scores = scores.masked_fill(token > last_seen.unsqueeze(1), float("-inf"))
    return torch.einsum("hnl,lhd->nhd", scores.softmax(-1), wide_values).to(q.dtype)  # [n, H, d]


def decode_gqa(q: torch.Tensor, kv: PagedKV, scale: float) -> torch.Tensor:
    """See :func:`kernels.attention.decode_gqa`."""
    return prefill_gqa(q, kv, (1,) * q.shape[0], scale)


def prefill_gqa(q: torch.Tensor, kv: PagedKV, query_lens: tuple[int, ...], scale: float) -> torch.Tensor:
    """See :func:`kernels.attention.prefill_gqa`."""
    outputs = []
    for sequence, rows in enumerate(q.split(query_lens)):
        tokens = sequence_tokens(kv, sequence)  # [L, 2, KH, d]
        outputs.append(attend(rows, tokens[:, 0], tokens[:, 1], scale))
    return torch.cat(outputs)
