"""Absorbed multi-head latent attention (DeepSeek-V2, section 2.1.2) in plain torch, float32 throughout."""

from __future__ import annotations

import torch

from kernels.attention.reference import attend
from kernels.paged_kv import PagedKV, sequence_tokens


def decode_mla(q_latent: torch.Tensor, q_rope: torch.Tensor, kv: PagedKV, scale: float) -> torch.Tensor:
    """See :func:`kernels.mla.decode_mla`."""
    return prefill_mla(q_latent, q_rope, kv, (1,) * q_latent.shape[0], scale)


def prefill_mla(
    q_latent: torch.Tensor, q_rope: torch.Tensor, kv: PagedKV, query_lens: tuple[int, ...], scale: float
) -> torch.Tensor:
    """See :func:`kernels.mla.prefill_mla`."""
    rank = q_latent.shape[-1]
    outputs = []
    for sequence, rows in enumerate(torch.cat((q_latent, q_rope), dim=-1).split(query_lens)):
        keys = sequence_tokens(kv, sequence).unsqueeze(1)  # [L, 1, rank + r]
        outputs.append(attend(rows, keys, keys, scale)[..., :rank])  # [n, H, rank]
    return torch.cat(outputs)
