"""Rotary embedding of queries and keys, fused with the write of this step's KV into the cache."""

from __future__ import annotations

import torch

from kernels.dispatch import cuda_form
from kernels.rope import cpu as host_form
from kernels.rope.table import RopeTable

__all__ = ["RopeTable", "rope_write_gqa", "rope_write_mla"]


def rope_write_gqa(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor,
    cache: torch.Tensor,
    slots: torch.Tensor,
    interleaved: bool = False,
) -> torch.Tensor:
    """Rotate `q` [T, H, d] and `k` [T, KH, d]; write the keys and `v` [T, KH, d] into `cache` [S, 2, KH, d] at `slots`
    [T] int64. `cos` and `sin` are [P, d/2] float32, `positions` [T] integers below P. Returns the rotated queries
    [T, H, d]. On CUDA nothing is written for a token whose slot is negative (rows that fill up a graph's batch)."""
    form = cuda_form(__name__) if q.is_cuda else host_form
    return form.rope_write_gqa(q, k, v, cos, sin, positions, cache, slots, interleaved)


def rope_write_mla(
    q_rope: torch.Tensor,
    latent: torch.Tensor,
    k_rope: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor,
    cache: torch.Tensor,
    slots: torch.Tensor,
    interleaved: bool,
) -> torch.Tensor:
    """Rotate `q_rope` [T, H, r] and the shared key `k_rope` [T, r]; write `latent` [T, rank] (already normed) and the
    key, side by side, into `cache` [S, rank + r] at `slots` [T] int64 (on CUDA not where it is negative). Returns the rotated queries [T, H, r]."""
    form = cuda_form(__name__) if q_rope.is_cuda else host_form
    return form.rope_write_mla(q_rope, latent, k_rope, cos, sin, positions, cache, slots, interleaved)
