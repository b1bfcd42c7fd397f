"""Multi-head latent attention in absorbed form: all heads share one latent of `rank + r` elements a token."""

from __future__ import annotations

import torch

from kernels.attention.scratch import decode_scratch_bytes, prefill_scratch_bytes
from kernels.dispatch import cuda_form
from kernels.mla import cpu as host_form
from kernels.paged_kv import PagedKV

MOST_HEADS_A_PROGRAM = 32  # of decode


def decode_mla(q_latent: torch.Tensor, q_rope: torch.Tensor, kv: PagedKV, scale: float) -> torch.Tensor:
    """One new token a sequence: `q_latent` [B, H, rank] (= q_nope W_UK), `q_rope` [B, H, r], cache [S, rank + r].
    score = (q_latent . c + q_rope . k_rope) * scale; result [B, H, rank] = sum p c, to be multiplied by W_UV."""
    return (cuda_form(__name__) if q_latent.is_cuda else host_form).decode_mla(q_latent, q_rope, kv, scale)


def prefill_mla(
    q_latent: torch.Tensor, q_rope: torch.Tensor, kv: PagedKV, query_lens: tuple[int, ...], scale: float
) -> torch.Tensor:
    """Causal chunks: as :func:`decode_mla` with `query_lens[b]` rows of sequence b, its last tokens. Result [T, H, rank]."""
    form = cuda_form(__name__) if q_latent.is_cuda else host_form
    return form.prefill_mla(q_latent, q_rope, kv, query_lens, scale)


def mla_scratch_bytes(batch: int, rows: int, heads: int, rank: int, sms: int) -> int:
    """As :func:`kernels.attention.gqa_scratch_bytes`, of latents of `rank` channels."""
    readers = -(-heads // MOST_HEADS_A_PROGRAM)
    return decode_scratch_bytes(batch, heads, readers, rank, sms) + prefill_scratch_bytes(
        rows, batch, heads, 1, rank, sms
    )
