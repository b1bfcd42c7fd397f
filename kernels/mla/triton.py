"""Absorbed MLA over latent pages on CUDA: a tile of latents is loaded once and serves as keys and, transposed, as values.

Rows are (token, head) pairs, so a tile of rows shares what it reads among heads: one token's heads in decode, several
tokens' in prefill.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels import tuning
from kernels.attention.shares import SharePlan, attend_shares
from kernels.attention.split import SplitPlan, block_channels, find_work, look_up, scale_log2, slots_of, write_chunk
from kernels.launch import ceil_div, launch, multiplies_by_warp_groups, next_power_of_2
from kernels.paged_kv import PagedKV
from kernels.tile import dot


@triton.jit
def _weigh(scores, token, last_seen, top, mass):
    """Of `scores` [M, N]: each lane's largest score so far, its sum of weights, the weights of these tokens, and the factor for
    what was summed before."""
    scores = tl.where(token[None, :] <= last_seen[:, None], scores, -float("inf"))
    new_top = tl.maximum(top, tl.max(scores, axis=1))
    base = tl.where(new_top == -float("inf"), 0.0, new_top)  # a lane that has seen nothing yet
    weights = tl.exp2(scores - base[:, None])
    fade = tl.exp2(top - base)
    return new_top, mass * fade + tl.sum(weights, axis=1), weights, fade


@triton.jit
def _load_queries(queries_ptr, row, exists, SIZES: tl.constexpr, DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Latents [M, D] and rope parts [M, R] of rows `row` [M]."""
    ROPE: tl.constexpr = SIZES[0]
    BLOCK_R: tl.constexpr = SIZES[1]
    q_latent_ptr, q_rope_ptr = queries_ptr
    channel = tl.arange(0, BLOCK_D)[None, :]
    turned = tl.arange(0, BLOCK_R)[None, :]
    wide_row = row.to(tl.int64)[:, None]
    mask = exists[:, None]
    q_latent = tl.load(q_latent_ptr + wide_row * DIM + channel, mask=mask & (channel < DIM), other=0.0)
    return q_latent, tl.load(q_rope_ptr + wide_row * ROPE + turned, mask=mask & (turned < ROPE), other=0.0)


@triton.jit
def _load_latents(
    cache_ptr, block, start, end,
    SIZES: tl.constexpr, DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_TOKENS: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Latents [N, D] and rope keys [N, R] of tokens `start`.. below `end`, which lie in `block`."""
    ROPE: tl.constexpr = SIZES[0]
    BLOCK_R: tl.constexpr = SIZES[1]
    entry = cache_ptr + slots_of(block, start, BLOCK_TOKENS, BLOCK_N)[:, None] * (DIM + ROPE)
    channel = tl.arange(0, BLOCK_D)[None, :]
    turned = tl.arange(0, BLOCK_R)[None, :]
    inside = (start + tl.arange(0, BLOCK_N) < end)[:, None]
    latents = tl.load(entry + channel, mask=inside & (channel < DIM), other=0.0)
    return latents, tl.load(entry + DIM + turned, mask=inside & (turned < ROPE), other=0.0)


@triton.jit
def _attend(
    queries, cache_ptr, reader, block, start, end, last_seen, scale, top, mass, acc,
    MASKED: tl.constexpr, SIZES: tl.constexpr, DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_TOKENS: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One step of online softmax: tokens `start`.. below `end` in `block`, row i seeing those up to `last_seen[i]`. There is one
    reader, and every step is `MASKED`."""
    q_latent, q_rope = queries
    latents, keys = _load_latents(cache_ptr, block, start, end, SIZES, DIM, BLOCK_D, BLOCK_TOKENS, BLOCK_N)
    nothing = tl.zeros((q_latent.shape[0], BLOCK_N), tl.float32)
    scores = dot(q_rope, tl.trans(keys), dot(q_latent, tl.trans(latents), nothing)) * scale
    top, mass, weights, fade = _weigh(scores, start + tl.arange(0, BLOCK_N), last_seen, top, mass)
    return top, mass, dot(weights.to(latents.dtype), latents, acc * fade[:, None])


@triton.jit
def _attend_by_warp_groups(
    queries, cache_ptr, reader, block, start, end, last_seen, scale, top, mass, acc,
    MASKED: tl.constexpr, SIZES: tl.constexpr, DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_TOKENS: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The same where a card multiplies by groups of four warps (Hopper) and a tile has two of them.

    Where Triton sees scores become an operand of another product, it lets each group compute whole rows of them: of 64 rows,
    both compute the same scores. It does not see so far through a branch. So they are computed in one that is always taken,
    and each group computes those of half of the tokens.
    """
    q_latent, q_rope = queries
    latents, keys = _load_latents(cache_ptr, block, start, end, SIZES, DIM, BLOCK_D, BLOCK_TOKENS, BLOCK_N)
    nothing = tl.zeros((q_latent.shape[0], BLOCK_N), tl.float32)
    # No constants: the compiler would keep a tile of them in shared memory.
    weights = tl.broadcast_to((mass * 0.0)[:, None], (q_latent.shape[0], BLOCK_N)).to(latents.dtype)
    fade = mass * 0.0 + 1.0
    if start < end:  # always
        # Scaled apart, or the compiler would make one product an operand of the other.
        scores = dot(q_latent, tl.trans(latents), nothing) * scale + dot(q_rope, tl.trans(keys), nothing) * scale
        top, mass, wide_weights, fade = _weigh(scores, start + tl.arange(0, BLOCK_N), last_seen, top, mass)
        weights = wide_weights.to(latents.dtype)
    return top, mass, dot(weights, latents, acc * fade[:, None])


@triton.jit
def _decode_kernel(
    q_latent_ptr,
    q_rope_ptr,
    cache_ptr,
    table_ptr,
    lens_ptr,
    out_ptr,
    partial_ptr,
    lse_ptr,
    batch,
    heads,
    readers,
    table_stride,
    programs,
    scale,
    BLOCK_H: tl.constexpr,
    ROPE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MIN_CHUNK: tl.constexpr,
):
    work = tl.program_id(1)
    sequence, first, end, whole = find_work(lens_ptr, batch, work, readers, programs, BLOCK_B, BLOCK_N, MIN_CHUNK)
    if sequence >= batch:
        return
    head = tl.program_id(0) * BLOCK_H + tl.arange(0, BLOCK_H)
    channel = tl.arange(0, BLOCK_D)[None, :]
    turned = tl.arange(0, BLOCK_R)[None, :]
    row = sequence * heads + head
    mask = (head < heads)[:, None]
    wide_row = row.to(tl.int64)[:, None]
    q_latent = tl.load(q_latent_ptr + wide_row * DIM + channel, mask=mask & (channel < DIM), other=0.0)
    q_rope = tl.load(q_rope_ptr + wide_row * ROPE + turned, mask=mask & (turned < ROPE), other=0.0)
    table = table_ptr + sequence.to(tl.int64) * table_stride
    top = tl.full((BLOCK_H,), -float("inf"), tl.float32)
    mass = tl.zeros((BLOCK_H,), tl.float32)
    acc = tl.zeros((BLOCK_H, BLOCK_D), tl.float32)
    last_seen = tl.zeros((BLOCK_H,), tl.int32) + (end - 1)
    for start in range(first, end, BLOCK_N):
        block = look_up(table, start, end, BLOCK_TOKENS, BLOCK_N)
        top, mass, acc = _attend(
            (q_latent, q_rope), cache_ptr, 0, block, start, end, last_seen, scale, top, mass, acc,
            True, (ROPE, BLOCK_R), DIM, BLOCK_D, BLOCK_TOKENS, BLOCK_N,
        )  # fmt: skip
    write_chunk(
        acc, top, mass, whole, row, work, head, heads, head < heads, out_ptr, partial_ptr, lse_ptr, DIM, BLOCK_D
    )


@triton.jit(do_not_specialize=["num_tiles"])
def _prefill_kernel(
    q_latent_ptr,
    q_rope_ptr,
    cache_ptr,
    table_ptr,
    lens_ptr,
    tiles_ptr,
    out_ptr,
    partial_ptr,
    lse_ptr,
    num_tiles,
    programs,
    table_stride,
    scale,
    WARP_GROUPS: tl.constexpr,
    ROPE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    MAY_SHARE: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    READERS: tl.constexpr,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    attend_shares(
        _load_queries, _attend_by_warp_groups if WARP_GROUPS else _attend, (q_latent_ptr, q_rope_ptr),
        cache_ptr, table_ptr, lens_ptr, tiles_ptr, out_ptr, partial_ptr, lse_ptr, num_tiles, programs, table_stride, scale,
        True, (ROPE, BLOCK_R), MAY_SHARE, BLOCK_TOKENS, READERS, GROUP, DIM, BLOCK_D, BLOCK_B, BLOCK_M, BLOCK_N,
    )  # fmt: skip


def decode_mla(q_latent: torch.Tensor, q_rope: torch.Tensor, kv: PagedKV, scale: float) -> torch.Tensor:
    """See :func:`kernels.mla.decode_mla`; the cache is read through `kv.block_table`."""
    q_latent, q_rope = q_latent.contiguous(), q_rope.contiguous()
    batch, heads, rank = q_latent.shape
    wide = q_latent.element_size() == 4
    default = {
        "BLOCK_H": max(16, min(16 if wide else 32, next_power_of_2(heads))),
        "BLOCK_N": 16 if wide else 32,
        "num_warps": 4 if heads <= 16 else 8,
        "num_stages": 3 if wide else 5,  # the block table's look-up takes two of them
        "waves": 2,
    }
    chosen = tuning.config("decode_mla", f"r{rank}_h{heads}_b{next_power_of_2(batch)}", q_latent, default)
    readers = ceil_div(heads, chosen["BLOCK_H"])
    plan = SplitPlan(q_latent, kv, readers, chosen["BLOCK_N"], rank, chosen["waves"])
    out = torch.empty_like(q_latent)
    launch(
        _decode_kernel,
        (readers, plan.work),
        q_latent,
        q_rope,
        kv.cache,
        kv.block_table,
        kv.kv_lens,
        out,
        plan.partial,
        plan.lse,
        batch,
        heads,
        readers,
        kv.block_table.stride(0),
        plan.programs,
        scale_log2(scale),
        BLOCK_H=chosen["BLOCK_H"],
        ROPE=q_rope.shape[2],
        BLOCK_R=block_channels(q_rope.shape[2]),
        BLOCK_TOKENS=kv.block_tokens,
        **plan.constants,
        num_warps=chosen["num_warps"],
        num_stages=chosen["num_stages"],
    )
    plan.combine(out)
    return out


def prefill_mla(
    q_latent: torch.Tensor, q_rope: torch.Tensor, kv: PagedKV, query_lens: tuple[int, ...], scale: float
) -> torch.Tensor:
    """See :func:`kernels.mla.prefill_mla`; the cache is read through `kv.block_table`."""
    q_latent, q_rope = q_latent.contiguous(), q_rope.contiguous()
    _, heads, rank = q_latent.shape
    wide = q_latent.element_size() == 4
    default = {
        "BLOCK_M": 16 if wide else 64,
        "BLOCK_N": 16 if wide else 32,
        "num_warps": 8,
        "num_stages": 2 if wide else 3,
        "waves": 1,
    }
    chosen = tuning.config("prefill_mla", f"r{rank}_h{heads}", q_latent, default)
    return SharePlan(q_latent, kv, query_lens, 1, rank, chosen).attend(
        _prefill_kernel,
        (q_latent, q_rope),
        scale,
        WARP_GROUPS=not wide and multiplies_by_warp_groups(q_latent.device),
        ROPE=q_rope.shape[2],
        BLOCK_R=block_channels(q_rope.shape[2]),
    )
