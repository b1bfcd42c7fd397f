"""The FFN of up to `SMALL_ROWS` rows on CUDA: nothing is sorted, and the last program of a slice adds up the choices.

A program takes one expert and a slice of its width, with all rows as the one tile that the tensor cores need anyway; rows
that did not choose the expert are masked, so neither read nor stored. The routing weight is multiplied in before down. Two
launches, and the same bits every time.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels.launch import ceil_div, launch, next_power_of_2
from kernels.moe_ffn.blocks import SMALL_ROWS
from kernels.moe_ffn.tiles import evenness, gate_up_tile, multiply_tile

MAX_REGISTERS = 255  # of the kernels for few rows: without a limit the assembler takes 64 and spills a few


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
    top = expert.to(tl.int32) * 2 * width
    first = tl.program_id(0) * BLOCK_N
    result = gate_up_tile(
        x, weight_ptr, top, first, width, depth, chose[:, None], EVEN, False, BLOCK_M, BLOCK_N, BLOCK_K
    )
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
        acc = multiply_tile(hidden, weights, width, (row < rows)[:, None], inside, width, acc, EVEN, BLOCK_K)
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
        acc = multiply_tile(
            hidden_ptr + place * width, weights, width, chose[:, None], inside, width, acc, EVEN, BLOCK_K
        )
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


def ffn_few_rows(
    x: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    topk_weights: torch.Tensor | None,
    topk_experts: torch.Tensor | None,
    chosen: dict[str, int],
) -> torch.Tensor:
    """One FFN of all rows where `topk_experts` is None, else the routed one; block sizes as `chosen`."""
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
    even_up, even_down = evenness(depth, width, chosen)
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
