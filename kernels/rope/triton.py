"""Rotary embedding and the KV write on CUDA, one launch: a program a token and a block of heads."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels.launch import ceil_div, launch, next_power_of_2

BLOCK_HEADS = 8


@triton.jit
def _rotate(pointers, first, second, cos, sin, mask):
    """The two rotated halves [heads, half] of the heads at `pointers`; `first` and `second` are their channels."""
    a = tl.load(pointers + first, mask=mask, other=0.0).to(tl.float32)
    b = tl.load(pointers + second, mask=mask, other=0.0).to(tl.float32)
    return a * cos - b * sin, b * cos + a * sin


@triton.jit
def _channels(half, HALF: tl.constexpr, INTERLEAVED: tl.constexpr):
    """The channels [1, HALF] that rotate together."""
    pair = tl.arange(0, HALF)[None, :]
    if INTERLEAVED:
        return 2 * pair, 2 * pair + 1, pair
    return pair, pair + half, pair


@triton.jit
def _rope_gqa_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    cos_ptr,
    sin_ptr,
    position_ptr,
    cache_ptr,
    slot_ptr,
    out_ptr,
    num_heads,
    num_kv_heads,
    half,
    q_token_stride,
    q_head_stride,
    k_token_stride,
    k_head_stride,
    v_token_stride,
    v_head_stride,
    INTERLEAVED: tl.constexpr,
    BLOCK_H: tl.constexpr,
    HALF: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)[:, None]  # query heads, then KV heads
    kv_head = head - num_heads
    first, second, pair = _channels(half, HALF, INTERLEAVED)
    inside = pair < half
    is_query = (head < num_heads) & inside
    is_key = (head >= num_heads) & (kv_head < num_kv_heads) & inside
    position = tl.load(position_ptr + token).to(tl.int64)
    cos = tl.load(cos_ptr + position * half + pair, mask=inside, other=0.0)
    sin = tl.load(sin_ptr + position * half + pair, mask=inside, other=0.0)
    dim = 2 * half

    a, b = _rotate(q_ptr + token * q_token_stride + head * q_head_stride, first, second, cos, sin, is_query)
    out = out_ptr + (token * num_heads + head) * dim
    tl.store(out + first, a.to(out_ptr.dtype.element_ty), mask=is_query)
    tl.store(out + second, b.to(out_ptr.dtype.element_ty), mask=is_query)

    if (tl.program_id(1) + 1) * BLOCK_H > num_heads:
        slot = tl.load(slot_ptr + token).to(tl.int64)
        written = is_key & (slot + tl.zeros_like(head) >= 0)
        key = cache_ptr + (2 * slot * num_kv_heads + kv_head) * dim
        value = key + num_kv_heads * dim
        a, b = _rotate(k_ptr + token * k_token_stride + kv_head * k_head_stride, first, second, cos, sin, written)
        tl.store(key + first, a.to(cache_ptr.dtype.element_ty), mask=written)
        tl.store(key + second, b.to(cache_ptr.dtype.element_ty), mask=written)
        source = v_ptr + token * v_token_stride + kv_head * v_head_stride
        tl.store(value + first, tl.load(source + first, mask=written), mask=written)
        tl.store(value + second, tl.load(source + second, mask=written), mask=written)


@triton.jit
def _rope_mla_kernel(
    q_ptr,
    latent_ptr,
    k_ptr,
    cos_ptr,
    sin_ptr,
    position_ptr,
    cache_ptr,
    slot_ptr,
    out_ptr,
    num_heads,
    rank,
    half,
    q_token_stride,
    q_head_stride,
    latent_stride,
    k_stride,
    INTERLEAVED: tl.constexpr,
    BLOCK_H: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_RANK: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)[:, None]
    first, second, pair = _channels(half, HALF, INTERLEAVED)
    inside = pair < half
    is_query = (head < num_heads) & inside
    position = tl.load(position_ptr + token).to(tl.int64)
    cos = tl.load(cos_ptr + position * half + pair, mask=inside, other=0.0)
    sin = tl.load(sin_ptr + position * half + pair, mask=inside, other=0.0)

    a, b = _rotate(q_ptr + token * q_token_stride + head * q_head_stride, first, second, cos, sin, is_query)
    out = out_ptr + (token * num_heads + head) * (2 * half)
    tl.store(out + first, a.to(out_ptr.dtype.element_ty), mask=is_query)
    tl.store(out + second, b.to(out_ptr.dtype.element_ty), mask=is_query)

    if tl.program_id(1) == 0:
        slot = tl.load(slot_ptr + token).to(tl.int64)
        entry = cache_ptr + slot * (rank + 2 * half)
        channel = tl.arange(0, BLOCK_RANK)
        of_latent = (channel < rank) & (slot + tl.zeros_like(channel) >= 0)
        latent = tl.load(latent_ptr + token * latent_stride + channel, mask=of_latent)
        tl.store(entry + channel, latent, mask=of_latent)
        of_key = inside & (slot + tl.zeros_like(pair) >= 0)
        key_a, key_b = _rotate(k_ptr + token * k_stride, first, second, cos, sin, of_key)
        tl.store(entry + rank + first, key_a.to(cache_ptr.dtype.element_ty), mask=of_key)
        tl.store(entry + rank + second, key_b.to(cache_ptr.dtype.element_ty), mask=of_key)


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
    """See :func:`kernels.rope.rope_write_gqa`; q, k and v may be slices of one fused projection."""
    tokens, num_heads, dim = q.shape
    out = torch.empty((tokens, num_heads, dim), dtype=q.dtype, device=q.device)
    launch(
        _rope_gqa_kernel,
        (tokens, ceil_div(num_heads + k.shape[1], BLOCK_HEADS)),
        q,
        k,
        v,
        cos,
        sin,
        positions,
        cache,
        slots,
        out,
        num_heads,
        k.shape[1],
        dim // 2,
        *(stride for tensor in (q, k, v) for stride in tensor.stride()[:2]),
        INTERLEAVED=interleaved,
        BLOCK_H=BLOCK_HEADS,
        HALF=next_power_of_2(dim // 2),
        num_warps=4,
    )
    return out


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
    """See :func:`kernels.rope.rope_write_mla`; q_rope, latent and k_rope may be slices of wider tensors."""
    tokens, num_heads, dim = q_rope.shape
    rank = latent.shape[1]
    out = torch.empty((tokens, num_heads, dim), dtype=q_rope.dtype, device=q_rope.device)
    launch(
        _rope_mla_kernel,
        (tokens, ceil_div(num_heads, BLOCK_HEADS)),
        q_rope,
        latent,
        k_rope,
        cos,
        sin,
        positions,
        cache,
        slots,
        out,
        num_heads,
        rank,
        dim // 2,
        q_rope.stride(0),
        q_rope.stride(1),
        latent.stride(0),
        k_rope.stride(0),
        INTERLEAVED=interleaved,
        BLOCK_H=BLOCK_HEADS,
        HALF=next_power_of_2(dim // 2),
        BLOCK_RANK=next_power_of_2(rank),
        num_warps=4,
    )
    return out
