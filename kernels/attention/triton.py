"""MHA and GQA over pages on CUDA: split decode, and prefill by tiles of query rows."""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl

from kernels import tuning
from kernels.attention.split import SplitPlan, block_channels, block_slots, find_work, scale_log2, write_chunk
from kernels.launch import launch, next_power_of_2
from kernels.paged_kv import PagedKV
from kernels.tile import dot


@triton.jit
def _attend_tile(
    q,
    cache_ptr,
    table_ptr,
    start,
    end,
    last_seen,
    kv_head,
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
    """One step of online softmax: tokens `start`.. below `end`, row i seeing those up to `last_seen[i]`."""
    slots = block_slots(table_ptr, start, end, BLOCK_TOKENS, BLOCK_N)
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
    scores = dot(q, tl.trans(keys), tl.zeros((q.shape[0], BLOCK_N), tl.float32)) * scale
    if MASKED:
        scores = tl.where(token[None, :] <= last_seen[:, None], scores, -float("inf"))
    new_top = tl.maximum(top, tl.max(scores, axis=1))
    weights = tl.exp2(scores - new_top[:, None])
    fade = tl.exp2(top - new_top)
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
        top, mass, acc = _attend_tile(
            q, cache_ptr, table, start, end, last_seen, kv_head, scale, top, mass, acc,
            True, KV_HEADS, DIM, BLOCK_D, BLOCK_TOKENS, BLOCK_N,
        )  # fmt: skip
    write_chunk(
        acc, top, mass, whole, row, work, head, KV_HEADS * GROUP, member < GROUP, out_ptr, partial_ptr, lse_ptr,
        DIM, BLOCK_D,
    )  # fmt: skip


@triton.jit
def _prefill_kernel(
    q_ptr,
    cache_ptr,
    table_ptr,
    lens_ptr,
    tiles_ptr,
    out_ptr,
    table_stride,
    scale,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    head = tl.program_id(0)
    tile = tiles_ptr + tl.program_id(1) * 4
    sequence = tl.load(tile)
    first_row = tl.load(tile + 1)
    rows = tl.load(tile + 2)
    position = tl.load(lens_ptr + sequence) - tl.load(tile + 3)  # of the tile's first row
    lane = tl.arange(0, BLOCK_M)
    channel = tl.arange(0, BLOCK_D)[None, :]
    place = ((first_row + lane).to(tl.int64) * (KV_HEADS * GROUP) + head)[:, None] * DIM + channel
    mask = (lane < rows)[:, None] & (channel < DIM)
    q = tl.load(q_ptr + place, mask=mask, other=0.0)
    table = table_ptr + sequence.to(tl.int64) * table_stride
    top = tl.full((BLOCK_M,), -float("inf"), tl.float32)
    mass = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    last_seen = tl.maximum(position + lane, 0)  # rows that fill up a graph's chunk may lie before the first token
    end = tl.maximum(position + rows, 1)
    everyone_sees = tl.maximum(position + 1, 0) // BLOCK_N * BLOCK_N
    for start in range(0, everyone_sees, BLOCK_N):
        top, mass, acc = _attend_tile(
            q, cache_ptr, table, start, end, last_seen, head // GROUP, scale, top, mass, acc,
            False, KV_HEADS, DIM, BLOCK_D, BLOCK_TOKENS, BLOCK_N,
        )  # fmt: skip
    for start in range(everyone_sees, end, BLOCK_N):
        top, mass, acc = _attend_tile(
            q, cache_ptr, table, start, end, last_seen, head // GROUP, scale, top, mass, acc,
            True, KV_HEADS, DIM, BLOCK_D, BLOCK_TOKENS, BLOCK_N,
        )  # fmt: skip
    tl.store(out_ptr + place, (acc / mass[:, None]).to(out_ptr.dtype.element_ty), mask=mask)


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


@functools.lru_cache(maxsize=128)
def query_tiles(query_lens: tuple[int, ...], rows_per_tile: int, device: torch.device) -> torch.Tensor:
    """Tiles [N, 4] int32 of a ragged batch: sequence, first row, rows, rows from the tile's first to the sequence's last.
    Those that see most come first. Kept for the next layers, which ask for the same."""
    tiles, first = [], 0
    for sequence, length in enumerate(query_lens):
        for done in range(0, length, rows_per_tile):
            tiles.append((sequence, first + done, min(rows_per_tile, length - done), length - done))
        first += length
    tiles.sort(key=lambda tile: tile[3])
    return torch.tensor(tiles, dtype=torch.int32, device=device).reshape(-1, 4)


def prefill_gqa(q: torch.Tensor, kv: PagedKV, query_lens: tuple[int, ...], scale: float) -> torch.Tensor:
    """See :func:`kernels.attention.prefill_gqa`; the cache is read through `kv.block_table`."""
    q = q.contiguous()
    _, num_heads, dim = q.shape
    kv_heads = kv.cache.shape[2]
    longest = max(query_lens)
    if q.element_size() == 4:
        default = {"BLOCK_M": 16, "BLOCK_N": 32, "num_warps": 8, "num_stages": 2}
    elif longest <= 64:
        default = {"BLOCK_M": 64, "BLOCK_N": 64, "num_warps": 4, "num_stages": 3}
    else:
        default = {"BLOCK_M": 128, "BLOCK_N": 64, "num_warps": 8, "num_stages": 3}
    if longest <= 16:
        default["BLOCK_M"] = 16
    chosen = tuning.config("prefill_gqa", f"d{dim}_t{next_power_of_2(longest)}", q, default)
    tiles = query_tiles(tuple(query_lens), chosen["BLOCK_M"], q.device)
    out = torch.empty_like(q)
    launch(
        _prefill_kernel,
        (num_heads, len(tiles)),
        q,
        kv.cache,
        kv.block_table,
        kv.kv_lens,
        tiles,
        out,
        kv.block_table.stride(0),
        scale_log2(scale),
        KV_HEADS=kv_heads,
        GROUP=num_heads // kv_heads,
        BLOCK_TOKENS=kv.block_tokens,
        DIM=dim,
        BLOCK_D=block_channels(dim),
        **chosen,
    )
    return out
