"""The FFN of many rows on CUDA: choices sorted by expert, tiles that find their expert from the offsets, a sum at the end."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels.launch import ceil_div, launch, next_power_of_2
from kernels.moe_ffn.blocks import OF_DOWN
from kernels.moe_ffn.tiles import gate_up_tile, multiply_tile
from kernels.router.triton import sort_by_expert

FEWEST_HALVED = 128  # rows of a tile from which on one that is at most half full is done as half a tile


@triton.jit
def _find_tile(offsets_ptr, tile, num_experts, BLOCK_E: tl.constexpr, BLOCK_M: tl.constexpr):
    """(expert, or at least `num_experts` where there is no such tile; first row; end row) of a tile of sorted rows."""
    index = tl.arange(0, BLOCK_E)
    begin = tl.load(offsets_ptr + index, mask=index < num_experts, other=0).to(tl.int32)
    end = tl.load(offsets_ptr + index + 1, mask=index < num_experts, other=0).to(tl.int32)
    tiles = tl.cdiv(end - begin, BLOCK_M)
    expert = tl.sum((tl.cumsum(tiles, axis=0) <= tile).to(tl.int32))
    before = tl.sum(tl.where(index < expert, tiles, 0))
    first = tl.sum(tl.where(index == expert, begin, 0)) + (tile - before) * BLOCK_M
    return expert, first, tl.sum(tl.where(index == expert, end, 0))


@triton.jit
def _tile_and_slice(num_tiles, slices, group):
    """This program's tile of rows and slice of channels: `group` tiles after one another take the same slice, then the next, so
    that programs that run at once share rows as well as weights."""
    first = tl.program_id(0) // (group * slices) * group
    size = tl.minimum(num_tiles - first, group)
    place = tl.program_id(0) % (group * slices)
    return first + place % size, place // size


@triton.jit
def _gate_up_rows(
    x_ptr, weight_ptr, topk_weights_ptr, order_ptr, hidden_ptr, expert, start, end, first, depth, width, x_stride,
    DENSE: tl.constexpr, EVEN: tl.constexpr, K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Channels `first`.. of the hidden rows `start` to `end`, of at most `BLOCK_M`."""
    position = start + tl.arange(0, BLOCK_M)
    mask = position < end
    if DENSE:
        token = position
        weight = tl.full((BLOCK_M,), 1.0, tl.float32)
    else:
        choice = tl.load(order_ptr + position, mask=mask, other=0)
        token = choice // K
        weight = tl.load(topk_weights_ptr + choice, mask=mask, other=0.0)
    x = x_ptr + token.to(tl.int64)[:, None] * x_stride
    weights = weight_ptr + expert.to(tl.int64) * 2 * width * depth
    result = gate_up_tile(x, weights, first, width, depth, mask[:, None], EVEN, BLOCK_M, BLOCK_N, BLOCK_K)
    out = first + tl.arange(0, BLOCK_N)[None, :]
    result = (result * weight[:, None]).to(hidden_ptr.dtype.element_ty)
    tl.store(hidden_ptr + position.to(tl.int64)[:, None] * width + out, result, mask=mask[:, None] & (out < width))


@triton.jit
def _gate_up_kernel(
    x_ptr,
    weight_ptr,
    topk_weights_ptr,
    order_ptr,
    offsets_ptr,
    hidden_ptr,
    rows,
    depth,
    width,
    x_stride,
    num_experts,
    num_tiles,
    slices,
    group,
    DENSE: tl.constexpr,
    EVEN: tl.constexpr,
    HALVES: tl.constexpr,
    K: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    tile, part = _tile_and_slice(num_tiles, slices, group)
    if DENSE:
        expert, start, end = tile * 0, tile * BLOCK_M, rows
    else:
        expert, start, end = _find_tile(offsets_ptr, tile, num_experts, BLOCK_E, BLOCK_M)
        if expert >= num_experts:
            return
    if HALVES and end - start <= BLOCK_M // 2:
        _gate_up_rows(
            x_ptr, weight_ptr, topk_weights_ptr, order_ptr, hidden_ptr, expert, start, end, part * BLOCK_N, depth, width,
            x_stride, DENSE, EVEN, K, BLOCK_M // 2, BLOCK_N, BLOCK_K,
        )  # fmt: skip
    else:
        _gate_up_rows(
            x_ptr, weight_ptr, topk_weights_ptr, order_ptr, hidden_ptr, expert, start, end, part * BLOCK_N, depth, width,
            x_stride, DENSE, EVEN, K, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip


@triton.jit
def _down_rows(
    hidden_ptr, weight_ptr, order_ptr, out_ptr, expert, start, end, first, depth, width,
    DENSE: tl.constexpr, EVEN: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Channels `first`.. of down, of the hidden rows `start` to `end`, of at most `BLOCK_M`."""
    position = start + tl.arange(0, BLOCK_M)
    mask = position < end
    target = position
    if not DENSE:
        target = tl.load(order_ptr + position, mask=mask, other=0)
    out = first + tl.arange(0, BLOCK_N)
    hidden = hidden_ptr + position.to(tl.int64)[:, None] * width
    weights = weight_ptr + (expert.to(tl.int64) * depth + out)[:, None] * width
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    acc = multiply_tile(hidden, weights, width, mask[:, None], (out < depth)[:, None], width, acc, EVEN, BLOCK_K)
    place = target.to(tl.int64)[:, None] * depth + out[None, :]
    tl.store(out_ptr + place, acc.to(out_ptr.dtype.element_ty), mask=mask[:, None] & (out < depth)[None, :])


@triton.jit
def _down_kernel(
    hidden_ptr,
    weight_ptr,
    order_ptr,
    offsets_ptr,
    out_ptr,
    rows,
    depth,
    width,
    num_experts,
    num_tiles,
    slices,
    group,
    DENSE: tl.constexpr,
    EVEN: tl.constexpr,
    HALVES: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One row of `out_ptr` a choice (where not `DENSE`), already weighted."""
    tile, part = _tile_and_slice(num_tiles, slices, group)
    if DENSE:
        expert, start, end = tile * 0, tile * BLOCK_M, rows
    else:
        expert, start, end = _find_tile(offsets_ptr, tile, num_experts, BLOCK_E, BLOCK_M)
        if expert >= num_experts:
            return
    if HALVES and end - start <= BLOCK_M // 2:
        _down_rows(
            hidden_ptr, weight_ptr, order_ptr, out_ptr, expert, start, end, part * BLOCK_N, depth, width,
            DENSE, EVEN, BLOCK_M // 2, BLOCK_N, BLOCK_K,
        )  # fmt: skip
    else:
        _down_rows(
            hidden_ptr, weight_ptr, order_ptr, out_ptr, expert, start, end, part * BLOCK_N, depth, width,
            DENSE, EVEN, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip


@triton.jit
def _sum_choices_kernel(partial_ptr, out_ptr, depth, K: tl.constexpr, BLOCK_N: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    out = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    total = tl.zeros((BLOCK_N,), tl.float32)
    for slot in range(K):
        total += tl.load(partial_ptr + (row * K + slot) * depth + out, mask=out < depth, other=0.0).to(tl.float32)
    tl.store(out_ptr + row * depth + out, total.to(out_ptr.dtype.element_ty), mask=out < depth)


def ffn_many_rows(
    x: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    topk_weights: torch.Tensor | None,
    topk_experts: torch.Tensor | None,
    chosen: dict[str, int],
) -> torch.Tensor:
    """One FFN of all rows where `topk_experts` is None, else the routed one; block sizes as `chosen`."""
    rows, depth = x.shape
    num_experts, width = gate_up.shape[0], down.shape[2]
    out = torch.empty((rows, depth), dtype=x.dtype, device=x.device)
    routed = topk_experts is not None
    if routed:
        choices = topk_experts.numel()
        order, offsets = sort_by_expert(topk_experts, num_experts)
        target = torch.empty((choices, depth), dtype=x.dtype, device=x.device)
    else:
        choices, target = rows, out
        order = offsets = topk_weights = out  # not read
    hidden = torch.empty((choices, width), dtype=x.dtype, device=x.device)
    experts = min(num_experts, choices) if routed else 0
    shared = {"DENSE": not routed, "BLOCK_E": next_power_of_2(num_experts)}

    def grid(blocks: dict[str, int], channels: int) -> tuple[int, int]:
        tiles = choices // blocks["BLOCK_M"] + experts if routed else ceil_div(rows, blocks["BLOCK_M"])
        return tiles, ceil_div(channels, blocks["BLOCK_N"])

    tiles, slices = grid(chosen, width)
    launch(
        _gate_up_kernel,
        (tiles * slices,),
        *(x, gate_up, topk_weights, order, offsets, hidden, rows, depth, width, x.stride(0), num_experts),
        *(tiles, slices, min(tiles, chosen["GROUP"])),
        EVEN=depth % chosen["BLOCK_K"] == 0 and width % chosen["BLOCK_N"] == 0,
        K=choices // rows,
        **shared,
        **_constants(chosen),
    )
    chosen = {name: chosen[of_down] for name, of_down in OF_DOWN.items()}
    tiles, slices = grid(chosen, depth)
    launch(
        _down_kernel,
        (tiles * slices,),
        *(hidden, down, order, offsets, target, rows, depth, width, num_experts),
        *(tiles, slices, min(tiles, chosen["GROUP"])),
        EVEN=width % chosen["BLOCK_K"] == 0 and depth % chosen["BLOCK_N"] == 0,
        **shared,
        **_constants(chosen),
    )
    if routed:
        block = min(1024, next_power_of_2(depth))
        grid_of_sums = (rows, ceil_div(depth, block))
        launch(_sum_choices_kernel, grid_of_sums, target, out, depth, K=choices // rows, BLOCK_N=block, num_warps=4)
    return out


def _constants(blocks: dict[str, int]) -> dict[str, int]:
    names = ("BLOCK_M", "BLOCK_N", "BLOCK_K", "num_warps", "num_stages")
    # Half a tile is still what a warp group multiplies by; a quarter would be slower to no end.
    return {name: blocks[name] for name in names} | {"HALVES": blocks["BLOCK_M"] >= FEWEST_HALVED}
