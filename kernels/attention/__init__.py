"""MHA and GQA over a paged KV cache: one query row a sequence (decode), or a chunk of rows (prefill)."""

from __future__ import annotations

import torch

from kernels.attention import cpu as host_form
from kernels.attention.scratch import decode_scratch_bytes, prefill_scratch_bytes
from kernels.dispatch import cuda_form
from kernels.paged_kv import PagedKV


def decode_gqa(q: torch.Tensor, kv: PagedKV, scale: float) -> torch.Tensor:
    """Attention of one new token a sequence: `q` [B, H, d] over the sequences of `kv`; result [B, H, d]."""
    return (cuda_form(__name__) if q.is_cuda else host_form).decode_gqa(q, kv, scale)


def prefill_gqa(q: torch.Tensor, kv: PagedKV, query_lens: tuple[int, ...], scale: float) -> torch.Tensor:
    """Causal attention of a ragged batch of chunks: `q` [T, H, d] holds, sequence after sequence, `query_lens[b]` rows,
    which are the last tokens of the `kv_lens[b]` in the cache. Result [T, H, d]."""
    return (cuda_form(__name__) if q.is_cuda else host_form).prefill_gqa(q, kv, query_lens, scale)


def gqa_scratch_bytes(batch: int, rows: int, heads: int, kv_heads: int, dim: int, sms: int) -> int:
    """What a step of up to `batch` sequences, of which chunks have `rows` rows together, takes at most on a card of `sms`
    multiprocessors beside its inputs and output. Every layer takes the same again; on the CPU it is nothing."""
    decode = decode_scratch_bytes(batch, heads, kv_heads, dim, sms)
    return decode + prefill_scratch_bytes(rows, batch, heads, kv_heads, dim, sms)
