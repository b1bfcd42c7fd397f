"""Rotary embedding on the CPU: a pair of adjacent channels is one complex number, turned by one complex product.

Models that pair channel i with i + d/2 get there by a permutation of channels (:func:`adjacent_pairs`), applied once to
what makes the channels; queries and keys permuted alike have the same products.
"""

from __future__ import annotations

import torch


def adjacent_pairs(weight: torch.Tensor, dim: int) -> torch.Tensor:
    """`weight` [heads * dim, ...] with the output channels of each head reordered to 0, dim/2, 1, dim/2 + 1, ..."""
    halves = weight.reshape(-1, 2, dim // 2, *weight.shape[1:])
    return halves.transpose(1, 2).reshape(weight.shape)


def rotate_pairs_(x: torch.Tensor, turns: torch.Tensor) -> None:
    """Turn each adjacent pair of `x` [T, heads, dim] in place by `turns` [T, 1, dim / 2] complex64; in float32 inside."""
    pairs = (*x.shape[:-1], x.shape[-1] // 2, 2)
    odd = x.storage_offset() | x.stride(0) | x.stride(1)  # a complex view needs all of them even
    if x.dtype == torch.float32 and not odd & 1:
        torch.view_as_complex(x.view(pairs)).mul_(turns)
        return
    wide = x.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
    torch.view_as_complex(wide.view(pairs)).mul_(turns)
    x.copy_(wide)


def _rotated(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, positions: torch.Tensor, interleaved: bool
) -> torch.Tensor:
    turns = torch.complex(cos.index_select(0, positions), sin.index_select(0, positions)).unsqueeze(1)  # [T, 1, d/2]
    rows, heads, dim = x.shape
    if interleaved:
        out = x.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
        torch.view_as_complex(out.view(rows, heads, dim // 2, 2)).mul_(turns)
        return out.to(x.dtype)
    turned = torch.complex(*x.float().chunk(2, dim=-1)).mul_(turns)
    return torch.cat((turned.real, turned.imag), dim=-1).to(x.dtype)


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
    turned = _rotated(torch.cat((q, k), dim=1), cos, sin, positions, interleaved)  # [T, H + KH, d]
    heads = q.shape[1]
    cache.index_copy_(0, slots, torch.stack((turned[:, heads:], v), dim=1).to(cache.dtype))
    return turned[:, :heads]


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
    turned = _rotated(torch.cat((q_rope, k_rope.unsqueeze(1)), dim=1), cos, sin, positions, interleaved)
    cache.index_copy_(0, slots, torch.cat((latent, turned[:, -1]), dim=-1).to(cache.dtype))
    return turned[:, :-1]
