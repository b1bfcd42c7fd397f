"""The routed FFN on CUDA: gate, up and SiLU in one kernel, down in the next.

Up to `SMALL_ROWS` tokens there is nothing to sort: a program takes one expert and a slice of its width, with all tokens as
the one tile that the tensor cores need anyway and rows that did not choose the expert masked, so neither read nor stored.
The routing weight is multiplied in before down, and the last program to finish a slice of the output adds up the choices
in their order: two launches, and the same bits every time. Beyond, choices are sorted by expert, programs find their
expert from the offsets, and a third kernel adds up.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels import tuning
from kernels.launch import ceil_div, launch, next_power_of_2, num_sms
from kernels.moe_ffn.weights import ExpertWeights
from kernels.router.triton import sort_by_expert
from kernels.tile import dot, silu

SMALL_ROWS = 16
MAX_REGISTERS = 255  # of the kernels for few rows: without a limit the assembler takes 64 and spills a few


@triton.jit
def _multiply(a, b_ptr, row_stride, a_mask, b_mask, depth, acc, EVEN: tl.constexpr, BLOCK_K: tl.constexpr):
    """`acc` + rows at pointers `a` [M, 1] times rows at `b_ptr` [N, 1], over `depth` channels."""
    lane = tl.arange(0, BLOCK_K)[None, :]
    for start in range(0, depth, BLOCK_K):
        channel = start + lane
        if EVEN:
            left = tl.load(a + channel, mask=a_mask, other=0.0)
            right = tl.load(b_ptr + channel)
        else:
            left = tl.load(a + channel, mask=a_mask & (channel < depth), other=0.0)
            right = tl.load(b_ptr + channel, mask=b_mask & (channel < depth), other=0.0)
        acc = dot(left, tl.trans(right), acc)
    return acc


@triton.jit
def gate_up_tile(
    x,
    weight_ptr,
    first,
    width,
    depth,
    row_mask,
    EVEN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """silu(gate x) * (up x) [M, N] in float32: rows at pointers `x` [M, 1], output channels `first`.. of `width`, weights
    [2 * width, depth] at `weight_ptr`. `EVEN`: the blocks divide both sizes, so only rows are masked."""
    out = first + tl.arange(0, BLOCK_N)
    lane = tl.arange(0, BLOCK_K)[None, :]
    inside = (out < width)[:, None]
    gate_row = weight_ptr + out.to(tl.int64)[:, None] * depth
    up_row = gate_row + tl.cast(width, tl.int64) * depth
    gate = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    up = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, depth, BLOCK_K):
        channel = start + lane
        if EVEN:
            rows = tl.load(x + channel, mask=row_mask, other=0.0)
            gate_weight = tl.load(gate_row + channel)
            up_weight = tl.load(up_row + channel)
        else:
            rows = tl.load(x + channel, mask=row_mask & (channel < depth), other=0.0)
            gate_weight = tl.load(gate_row + channel, mask=inside & (channel < depth), other=0.0)
            up_weight = tl.load(up_row + channel, mask=inside & (channel < depth), other=0.0)
        gate = dot(rows, tl.trans(gate_weight), gate)
        up = dot(rows, tl.trans(up_weight), up)
    return silu(gate) * up


@triton.jit
def _choice_of_rows(experts_ptr, weights_ptr, expert, rows, K: tl.constexpr, TOP_K: tl.constexpr, ROWS: tl.constexpr):
    """Which of the tile's rows chose `expert`, as which flat choice, and with what weight: each [ROWS]."""
    row = tl.arange(0, ROWS)
    slot = tl.arange(0, TOP_K)[None, :]
    place = row[:, None] * K + slot
    inside = (row < rows)[:, None] & (slot < K)
    match = tl.load(experts_ptr + place, mask=inside, other=-1) == expert
    weights = tl.load(weights_ptr + place, mask=inside & match, other=0.0)
    chose = tl.max(match.to(tl.int32), axis=1) == 1
    return chose, tl.sum(tl.where(match, place, 0), axis=1), tl.sum(weights, axis=1)


@triton.jit
def _is_first_of_its_expert(experts_ptr, choice, expert, CHOICES: tl.constexpr):
    earlier = tl.arange(0, CHOICES)
    same = tl.load(experts_ptr + earlier, mask=earlier < choice, other=-1) == expert
    return tl.sum(same.to(tl.int32)) == 0


@triton.jit
def _small_gate_up_kernel(
    x_ptr,
    weight_ptr,
    topk_weights_ptr,
    experts_ptr,
    hidden_ptr,
    arrivals_ptr,
    rows,
    depth,
    width,
    x_stride,
    num_arrivals,
    DENSE: tl.constexpr,
    EVEN: tl.constexpr,
    K: tl.constexpr,
    TOP_K: tl.constexpr,
    CHOICES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_A: tl.constexpr,
):
    choice = tl.program_id(1)
    if (choice == 0) & (tl.program_id(0) == 0):  # the next kernel counts in these
        arrival = tl.arange(0, BLOCK_A)
        tl.store(arrivals_ptr + arrival, tl.zeros((BLOCK_A,), tl.int32), mask=arrival < num_arrivals)
    row = tl.arange(0, BLOCK_M)
    if DENSE:
        expert = choice
        chose, place, weight = row < rows, row, tl.full((BLOCK_M,), 1.0, tl.float32)
    else:
        expert = tl.load(experts_ptr + choice)
        if not _is_first_of_its_expert(experts_ptr, choice, expert, CHOICES):
            return
        chose, place, weight = _choice_of_rows(experts_ptr, topk_weights_ptr, expert, rows, K, TOP_K, BLOCK_M)
    x = x_ptr + row[:, None] * x_stride
    weights = weight_ptr + expert.to(tl.int64) * 2 * width * depth
    first = tl.program_id(0) * BLOCK_N
    result = gate_up_tile(x, weights, first, width, depth, chose[:, None], EVEN, BLOCK_M, BLOCK_N, BLOCK_K)
    out = first + tl.arange(0, BLOCK_N)[None, :]
    result = (result * weight[:, None]).to(hidden_ptr.dtype.element_ty)
    tl.store(hidden_ptr + place.to(tl.int64)[:, None] * width + out, result, mask=chose[:, None] & (out < width))


@triton.jit
def _small_down_kernel(
    hidden_ptr,
    weight_ptr,
    topk_weights_ptr,
    experts_ptr,
    partial_ptr,
    out_ptr,
    arrivals_ptr,
    rows,
    depth,
    width,
    DENSE: tl.constexpr,
    EVEN: tl.constexpr,
    K: tl.constexpr,
    TOP_K: tl.constexpr,
    CHOICES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    choice = tl.program_id(1)
    row = tl.arange(0, BLOCK_M)
    out = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = (out < depth)[:, None]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if DENSE:
        hidden = hidden_ptr + row[:, None] * width
        weights = weight_ptr + out.to(tl.int64)[:, None] * width
        acc = _multiply(hidden, weights, width, (row < rows)[:, None], inside, width, acc, EVEN, BLOCK_K)
        result = acc.to(out_ptr.dtype.element_ty)
        tl.store(
            out_ptr + row[:, None] * depth + out[None, :], result, mask=(row < rows)[:, None] & (out < depth)[None, :]
        )
        return
    expert = tl.load(experts_ptr + choice)
    if _is_first_of_its_expert(experts_ptr, choice, expert, CHOICES):
        chose, place, _ = _choice_of_rows(experts_ptr, topk_weights_ptr, expert, rows, K, TOP_K, BLOCK_M)
        place = place.to(tl.int64)[:, None]
        weights = weight_ptr + (expert.to(tl.int64) * depth + out)[:, None] * width
        acc = _multiply(hidden_ptr + place * width, weights, width, chose[:, None], inside, width, acc, EVEN, BLOCK_K)
        tl.store(partial_ptr + place * depth + out[None, :], acc, mask=chose[:, None] & (out < depth)[None, :])
    # Every thread's stores before the arrival that publishes them.
    tl.debug_barrier()
    arrived = tl.atomic_add(arrivals_ptr + tl.program_id(0), 1, sem="acq_rel", scope="gpu")
    if arrived == tl.num_programs(1) - 1:
        tl.debug_barrier()
        total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        mask = (row < rows)[:, None] & (out < depth)[None, :]
        for slot in range(K):
            place = (row * K + slot).to(tl.int64)[:, None]
            total += tl.load(partial_ptr + place * depth + out[None, :], mask=mask, other=0.0, cache_modifier=".cg")
        tl.store(out_ptr + row[:, None] * depth + out[None, :], total.to(out_ptr.dtype.element_ty), mask=mask)


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
    acc = _multiply(hidden, weights, width, mask[:, None], (out < depth)[:, None], width, acc, EVEN, BLOCK_K)
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


def moe_ffn(
    x: torch.Tensor, weights: ExpertWeights, topk_weights: torch.Tensor, topk_experts: torch.Tensor
) -> torch.Tensor:
    """See :func:`kernels.moe_ffn.moe_ffn`."""
    return _ffn(x, weights.gate_up, weights.down, topk_weights.contiguous(), topk_experts.contiguous())


def dense(x: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
    """The same kernels for one FFN [2W, D], [D, W] that every row goes through."""
    return _ffn(x, gate_up.unsqueeze(0), down.unsqueeze(0), None, None)


def _ffn(
    x: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    topk_weights: torch.Tensor | None,
    topk_experts: torch.Tensor | None,
) -> torch.Tensor:
    rows, depth = x.shape
    num_experts, width = gate_up.shape[0], down.shape[2]
    small = rows <= SMALL_ROWS
    top_k = 1 if topk_experts is None else topk_experts.shape[1]
    default = _small_blocks(x, rows * top_k, width) if small else _large_blocks(x, rows * top_k / num_experts)
    key = f"d{depth}_w{width}_e{num_experts}_k{top_k}_t{next_power_of_2(rows)}"
    chosen = tuning.config("moe_ffn", key, x, default)
    run = _small if small else _large
    return run(x, gate_up, down, topk_weights, topk_experts, chosen)


def _small_blocks(x: torch.Tensor, choices: int, width: int) -> dict[str, int]:
    """Narrow slices while there are few programs, so that each multiprocessor has several reads in flight."""
    narrow = choices * ceil_div(width, 32) < 3 * num_sms(x.device)
    return {
        "BLOCK_N": 16 if narrow else 32,
        "DOWN_N": 16 if narrow else 32,
        "BLOCK_K": 64 if x.element_size() == 4 else 128,
        "num_warps": 4,
        "num_stages": 4,
    }


def _large_blocks(x: torch.Tensor, rows_per_expert: float) -> dict[str, int]:
    if x.element_size() == 4:
        return {"BLOCK_M": 16, "BLOCK_N": 32, "DOWN_N": 32, "BLOCK_K": 32, "num_warps": 4, "num_stages": 2}
    if rows_per_expert <= 16:
        return {"BLOCK_M": 16, "BLOCK_N": 64, "DOWN_N": 64, "BLOCK_K": 128, "num_warps": 4, "num_stages": 3}
    if rows_per_expert <= 48:
        return {"BLOCK_M": 32, "BLOCK_N": 64, "DOWN_N": 64, "BLOCK_K": 128, "num_warps": 4, "num_stages": 3}
    if rows_per_expert <= 96:
        return {"BLOCK_M": 64, "BLOCK_N": 64, "DOWN_N": 128, "BLOCK_K": 64, "num_warps": 4, "num_stages": 3}
    return {"BLOCK_M": 128, "BLOCK_N": 128, "DOWN_N": 128, "BLOCK_K": 64, "num_warps": 8, "num_stages": 3}


def _even(depth: int, width: int, chosen: dict[str, int]) -> tuple[bool, bool]:
    """Whether blocks divide the sizes, for gate and up and for down."""
    block_k = chosen["BLOCK_K"]
    return (
        depth % block_k == 0 and width % chosen["BLOCK_N"] == 0,
        width % block_k == 0 and depth % chosen["DOWN_N"] == 0,
    )


def _small(
    x: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    topk_weights: torch.Tensor | None,
    topk_experts: torch.Tensor | None,
    chosen: dict[str, int],
) -> torch.Tensor:
    rows, depth = x.shape
    width = down.shape[2]
    routed = topk_experts is not None
    top_k = topk_experts.shape[1] if routed else 1
    choices = rows * top_k if routed else 1
    slices = ceil_div(depth, chosen["DOWN_N"])
    hidden = torch.empty((rows * top_k, width), dtype=x.dtype, device=x.device)
    partial = torch.empty((rows * top_k if routed else 1, depth), dtype=torch.float32, device=x.device)
    arrivals = torch.empty(slices, dtype=torch.int32, device=x.device)
    out = torch.empty((rows, depth), dtype=x.dtype, device=x.device)
    even_up, even_down = _even(depth, width, chosen)
    shared = {
        "K": top_k,
        "TOP_K": next_power_of_2(top_k),
        "CHOICES": next_power_of_2(choices),
        "BLOCK_M": SMALL_ROWS,
        "BLOCK_K": chosen["BLOCK_K"],
        "num_warps": chosen["num_warps"],
        "num_stages": chosen["num_stages"],
        "maxnreg": MAX_REGISTERS,
    }
    topk_weights = partial if topk_weights is None else topk_weights
    experts = arrivals if topk_experts is None else topk_experts
    launch(
        _small_gate_up_kernel,
        (ceil_div(width, chosen["BLOCK_N"]), choices),
        *(x, gate_up, topk_weights, experts, hidden, arrivals, rows, depth, width, x.stride(0), slices),
        DENSE=not routed,
        EVEN=even_up,
        BLOCK_N=chosen["BLOCK_N"],
        BLOCK_A=next_power_of_2(slices),
        **shared,
    )
    launch(
        _small_down_kernel,
        (slices, choices),
        *(hidden, down, topk_weights, experts, partial, out, arrivals, rows, depth, width),
        DENSE=not routed,
        EVEN=even_down,
        BLOCK_N=chosen["DOWN_N"],
        **shared,
    )
    return out


def _large(
    x: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    topk_weights: torch.Tensor | None,
    topk_experts: torch.Tensor | None,
    chosen: dict[str, int],
) -> torch.Tensor:
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
    even_up, even_down = _even(depth, width, chosen)
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
