"""Rotary embedding (arXiv 2104.09864, eq. 34) and the write of this step's keys into the cache, in plain torch."""

from __future__ import annotations

import torch


def rotate(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, positions: torch.Tensor, interleaved: bool
) -> torch.Tensor:
    """`x` [T, H, d] rotated by its tokens' positions [T]. Pairs are (x0, x1), (x2, x3)... when `interleaved`, else
    (x0, x[d/2])...; each stays where it was. Tables are [P, d/2] float32."""
    cosine, sine = cos[positions.long()].unsqueeze(1), sin[positions.long()].unsqueeze(1)  # [T, 1, d/2]
    wide = x.float()
    if interleaved:
        first, second = wide[..., 0::2], wide[..., 1::2]
    else:
        first, second = wide.chunk(2, dim=-1)
    turned = (first * cosine - second * sine, second * cosine + first * sine)  # 2 x [T, H, d/2]
    joined = torch.stack(turned, dim=-1).flatten(-2) if interleaved else torch.cat(turned, dim=-1)
    return joined.to(x.dtype)  # [T, H, d]


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
    """See :func:`kernels.rope.rope_write_gqa`."""
    cache[slots, 0] = rotate(k, cos, sin, positions, interleaved).to(cache.dtype)
    cache[slots, 1] = v.to(cache.dtype)
    return rotate(q, cos, sin, positions, interleaved)


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
    """See :func:`kernels.rope.rope_write_mla`."""
    turned = rotate(k_rope.unsqueeze(1), cos, sin, positions, interleaved).squeeze(1)  # [T, r]
    cache[slots] = torch.cat((latent, turned), dim=-1).to(cache.dtype)
    return rotate(q_rope, cos, sin, positions, interleaved)
