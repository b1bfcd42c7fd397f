"""The FFN of many rows on CUDA: choices sorted by expert, tiles that find their expert from the offsets, a sum at the end."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels.launch import ceil_div, launch, next_power_of_2
from kernels.moe_ffn.tiles import evenness, gate_up_tile, multiply_tile
from kernels.router.triton import sort_by_expert


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
    DENSE: tl.constexpr,
    EVEN: tl.constexpr,
    K: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    if DENSE:
        expert = tl.program_id(0) * 0
        position = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
        mask = position < rows
        token = position
        weight = tl.full((BLOCK_M,), 1.0, tl.float32)
    else:
        expert, start, end = _find_tile(offsets_ptr, tl.program_id(0), num_experts, BLOCK_E, BLOCK_M)
        if expert >= num_experts:
            return
        position = start + tl.arange(0, BLOCK_M)
        mask = position < end
        choice = tl.load(order_ptr + position, mask=mask, other=0)
        token = choice // K
        weight = tl.load(topk_weights_ptr + choice, mask=mask, other=0.0)
    x = x_ptr + token.to(tl.int64)[:, None] * x_stride
    weights = weight_ptr + expert.to(tl.int64) * 2 * width * depth
    first = tl.program_id(1) * BLOCK_N
    result = gate_up_tile(x, weights, first, width, depth, mask[:, None], EVEN, BLOCK_M, BLOCK_N, BLOCK_K)
    out = first + tl.arange(0, BLOCK_N)[None, :]
    result = (result * weight[:, None]).to(hidden_ptr.dtype.element_ty)
    tl.store(hidden_ptr + position.to(tl.int64)[:, None] * width + out, result, mask=mask[:, None] & (out < width))


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
    DENSE: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One row of `out_ptr` a choice (where not `DENSE`), already weighted."""
    if DENSE:
        expert = tl.program_id(0) * 0
        position = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
        mask = position < rows
        target = position
    else:
        expert, start, end = _find_tile(offsets_ptr, tl.program_id(0), num_experts, BLOCK_E, BLOCK_M)
        if expert >= num_experts:
            return
        position = start + tl.arange(0, BLOCK_M)
        mask = position < end
        target = tl.load(order_ptr + position, mask=mask, other=0)
    out = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    hidden = hidden_ptr + position.to(tl.int64)[:, None] * width
    weights = weight_ptr + (expert.to(tl.int64) * depth + out)[:, None] * width
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    acc = multiply_tile(hidden, weights, width, mask[:, None], (out < depth)[:, None], width, acc, EVEN, BLOCK_K)
    place = target.to(tl.int64)[:, None] * depth + out[None, :]
    tl.store(out_ptr + place, acc.to(out_ptr.dtype.element_ty), mask=mask[:, None] & (out < depth)[None, :])


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
    block_m = chosen["BLOCK_M"]
    out = torch.empty((rows, depth), dtype=x.dtype, device=x.device)
    routed = topk_experts is not None
    if routed:
        choices = topk_experts.numel()
        order, offsets = sort_by_expert(topk_experts, num_experts)
        tiles = choices // block_m + min(num_experts, choices)
        target = torch.empty((choices, depth), dtype=x.dtype, device=x.device)
    else:
        choices, tiles, target = rows, ceil_div(rows, block_m), out
        order = offsets = topk_weights = out  # not read
    hidden = torch.empty((choices, width), dtype=x.dtype, device=x.device)
    even_up, even_down = evenness(depth, width, chosen)
    shared = {
        "DENSE": not routed,
        "BLOCK_E": next_power_of_2(num_experts),
        "BLOCK_M": block_m,
        "BLOCK_K": chosen["BLOCK_K"],
        "num_warps": chosen["num_warps"],
        "num_stages": chosen["num_stages"],
    }
    launch(
        _gate_up_kernel,
        (tiles, ceil_div(width, chosen["BLOCK_N"])),
        *(x, gate_up, topk_weights, order, offsets, hidden, rows, depth, width, x.stride(0), num_experts),
        EVEN=even_up,
        K=choices // rows,
        BLOCK_N=chosen["BLOCK_N"],
        **shared,
    )
    launch(
        _down_kernel,
        (tiles, ceil_div(depth, chosen["DOWN_N"])),
        *(hidden, down, order, offsets, target, rows, depth, width, num_experts),
        EVEN=even_down,
        BLOCK_N=chosen["DOWN_N"],
        **shared,
    )
    if routed:
        block = min(1024, next_power_of_2(depth))
        grid = (rows, ceil_div(depth, block))
        launch(_sum_choices_kernel, grid, target, out, depth, K=choices // rows, BLOCK_N=block, num_warps=4)
    return out
