"""MHA and GQA over pages on CUDA: split decode, and prefill by tiles of (row, head) pairs in even shares."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels import tuning
from kernels.attention.shares import SharePlan, attend_shares
from kernels.attention.split import SplitPlan, find_work, look_up, scale_log2, slots_of, write_chunk
from kernels.launch import launch, next_power_of_2
from kernels.paged_kv import PagedKV
from kernels.tile import dot

_PAIRS = (16, 32, 64, 128, 512, 2048)  # (row, head) pairs, up to each of which chunks share their block sizes


@triton.jit
def _load_queries(q_ptr, row, exists, KV_HEADS: tl.constexpr, DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Queries [M, D] of rows `row` [M]."""
    channel = tl.arange(0, BLOCK_D)[None, :]
    mask = exists[:, None] & (channel < DIM)
    return tl.load(q_ptr + row.to(tl.int64)[:, None] * DIM + channel, mask=mask, other=0.0)


@triton.jit
def _attend(
    q,
    cache_ptr,
    kv_head,
    block,
    start,
    end,
    last_seen,
    scale,
    top,
    mass,
    acc,
    MASKED: tl.constexpr,
    KV_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One step of online softmax: tokens `start`.. below `end` in `block`, row i seeing those up to `last_seen[i]`; all of them
    where it is not `MASKED`."""
    slots = slots_of(block, start, BLOCK_TOKENS, BLOCK_N)
    token = start + tl.arange(0, BLOCK_N)
    channel = tl.arange(0, BLOCK_D)[None, :]
    key = cache_ptr + (slots * (2 * KV_HEADS) + kv_head)[:, None] * DIM + channel
    if MASKED or DIM != BLOCK_D:
        mask = (token < end)[:, None] & (channel < DIM)
        keys = tl.load(key, mask=mask, other=0.0)  # [N, D]
        values = tl.load(key + KV_HEADS * DIM, mask=mask, other=0.0)
    else:
        keys = tl.load(key)
        values = tl.load(key + KV_HEADS * DIM)
    scores = dot(q, tl.trans(keys), tl.zeros((q.shape[0], BLOCK_N), tl.float32))
    if MASKED:
        scores = tl.where(token[None, :] <= last_seen[:, None], scores, -float("inf"))
    new_top = tl.maximum(top, tl.max(scores, axis=1) * scale)
    base = new_top
    if MASKED:  # a row that has seen nothing yet: nothing minus nothing is no number
        base = tl.where(new_top == -float("inf"), 0.0, new_top)
    weights = tl.exp2(scores * scale - base[:, None])
    fade = tl.exp2(top - base)
    mass = mass * fade + tl.sum(weights, axis=1)
    acc = dot(weights.to(values.dtype), values, acc * fade[:, None])
    return new_top, mass, acc


@triton.jit
def _decode_kernel(
    q_ptr,
    cache_ptr,
    table_ptr,
    lens_ptr,
    out_ptr,
    partial_ptr,
    lse_ptr,
    batch,
    table_stride,
    programs,
    scale,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MIN_CHUNK: tl.constexpr,
):
    kv_head = tl.program_id(0)
    work = tl.program_id(1)
    sequence, first, end, whole = find_work(lens_ptr, batch, work, KV_HEADS, programs, BLOCK_B, BLOCK_N, MIN_CHUNK)
    if sequence >= batch:
        return
    member = tl.arange(0, BLOCK_H)
    channel = tl.arange(0, BLOCK_D)[None, :]
    head = kv_head * GROUP + member
    row = sequence * (KV_HEADS * GROUP) + head
    mask = (member < GROUP)[:, None] & (channel < DIM)
    q = tl.load(q_ptr + row.to(tl.int64)[:, None] * DIM + channel, mask=mask, other=0.0)
    table = table_ptr + sequence.to(tl.int64) * table_stride
    top = tl.full((BLOCK_H,), -float("inf"), tl.float32)
    mass = tl.zeros((BLOCK_H,), tl.float32)
    acc = tl.zeros((BLOCK_H, BLOCK_D), tl.float32)
    last_seen = tl.zeros((BLOCK_H,), tl.int32) + (end - 1)
    for start in range(first, end, BLOCK_N):
        block = look_up(table, start, end, BLOCK_TOKENS, BLOCK_N)
        top, mass, acc = _attend(
            q, cache_ptr, kv_head, block, start, end, last_seen, scale, top, mass, acc,
            True, KV_HEADS, DIM, BLOCK_D, BLOCK_TOKENS, BLOCK_N,
        )  # fmt: skip
    write_chunk(
        acc, top, mass, whole, row, work, head, KV_HEADS * GROUP, member < GROUP, out_ptr, partial_ptr, lse_ptr,
        DIM, BLOCK_D,
    )  # fmt: skip


@triton.jit(do_not_specialize=["num_tiles"])
def _prefill_kernel(
    q_ptr,
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
        _load_queries, _attend,
        q_ptr, cache_ptr, table_ptr, lens_ptr, tiles_ptr, out_ptr, partial_ptr, lse_ptr, num_tiles, programs, table_stride,
        scale, False, READERS, MAY_SHARE, BLOCK_TOKENS, READERS, GROUP, DIM, BLOCK_D, BLOCK_B, BLOCK_M, BLOCK_N,
    )  # fmt: skip


def decode_gqa(q: torch.Tensor, kv: PagedKV, scale: float) -> torch.Tensor:
    """See :func:`kernels.attention.decode_gqa`; the cache is read through `kv.block_table`."""
    q = q.contiguous()
    batch, num_heads, dim = q.shape
    kv_heads = kv.cache.shape[2]
    wide = q.element_size() == 4
    block_h = max(16, next_power_of_2(num_heads // kv_heads))
    default = {"BLOCK_N": 32 if wide else 64, "num_warps": 4, "num_stages": 4 if wide else 5, "waves": 2}
    chosen = tuning.config("decode_gqa", f"d{dim}_kh{kv_heads}_b{next_power_of_2(batch)}", q, default)
    plan = SplitPlan(q, kv, kv_heads, chosen["BLOCK_N"], dim, chosen["waves"])
    out = torch.empty_like(q)
    launch(
        _decode_kernel,
        (kv_heads, plan.work),
        q,
        kv.cache,
        kv.block_table,
        kv.kv_lens,
        out,
        plan.partial,
        plan.lse,
        batch,
        kv.block_table.stride(0),
        plan.programs,
        scale_log2(scale),
        KV_HEADS=kv_heads,
        GROUP=num_heads // kv_heads,
        BLOCK_H=block_h,
        BLOCK_TOKENS=kv.block_tokens,
        **plan.constants,
        num_warps=chosen["num_warps"],
        num_stages=chosen["num_stages"],
    )
    plan.combine(out)
    return out


def prefill_gqa(q: torch.Tensor, kv: PagedKV, query_lens: tuple[int, ...], scale: float) -> torch.Tensor:
    """See :func:`kernels.attention.prefill_gqa`; the cache is read through `kv.block_table`."""
    q = q.contiguous()
    _, num_heads, dim = q.shape
    kv_heads = kv.cache.shape[2]
    # Pairs that share a KV head, of the longest chunk: what a tile is filled with, and how many read the same keys.
    filled = max(query_lens) * (num_heads // kv_heads)
    pairs = next((size for size in _PAIRS if filled <= size), _PAIRS[-1])
    if q.element_size() == 4:
        default = {"BLOCK_M": 16, "BLOCK_N": 32, "num_warps": 8, "num_stages": 2, "waves": 1}
    elif pairs <= 64:
        default = {"BLOCK_M": pairs, "BLOCK_N": 64, "num_warps": 4, "num_stages": 3, "waves": 2}
    else:
        default = {"BLOCK_M": 128, "BLOCK_N": 64, "num_warps": 8, "num_stages": 3, "waves": 1}
    chosen = tuning.config("prefill_gqa", f"d{dim}_kh{kv_heads}_p{pairs}", q, default)
    return SharePlan(q, kv, query_lens, kv_heads, dim, chosen).attend(_prefill_kernel, (q,), scale)
