"""The FFN of many rows on CUDA: choices sorted by expert, tiles listed with their experts, a sum at the end."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from kernels.launch import ceil_div, copies_by_descriptor, launch, next_power_of_2
from kernels.moe_ffn.blocks import OF_DOWN
from kernels.moe_ffn.tiles import gate_up_tile, multiply_tile
from kernels.router.triton import TILE_FIELDS, sort_into_tiles
from kernels.tile import dot

TMA_BYTES = 16
FEWEST_HALVED = 128  # rows of a tile from which on one that is at most half full is done as half a tile


@triton.jit
def _find_tile(tiles_ptr, tile):
    """(expert, or at least as many as there are where there is no such tile; first row; end row) of a tile of sorted rows."""
    entry = tiles_ptr + tile * TILE_FIELDS
    return tl.load(entry), tl.load(entry + 1), tl.load(entry + 2)


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
    x_ptr, weights, topk_weights_ptr, order_ptr, hidden_ptr, expert, start, end, first, depth, width, x_stride,
    DENSE: tl.constexpr, EVEN: tl.constexpr, TMA: tl.constexpr, K: tl.constexpr,
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
    top = expert * 2 * width
    result = gate_up_tile(x, weights, top, first, width, depth, mask[:, None], EVEN, TMA, BLOCK_M, BLOCK_N, BLOCK_K)
    out = first + tl.arange(0, BLOCK_N)[None, :]
    result = (result * weight[:, None]).to(hidden_ptr.dtype.element_ty)
    tl.store(hidden_ptr + position.to(tl.int64)[:, None] * width + out, result, mask=mask[:, None] & (out < width))


@triton.jit
def _gate_up_kernel(
    x_ptr,
    weights,
    topk_weights_ptr,
    order_ptr,
    tiles_ptr,
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
    TMA: tl.constexpr,
    HALVES: tl.constexpr,
    K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    tile, part = _tile_and_slice(num_tiles, slices, group)
    if DENSE:
        expert, start, end = tile * 0, tile * BLOCK_M, rows
    else:
        expert, start, end = _find_tile(tiles_ptr, tile)
        if expert >= num_experts:
            return
    if HALVES and end - start <= BLOCK_M // 2:
        _gate_up_rows(
            x_ptr, weights, topk_weights_ptr, order_ptr, hidden_ptr, expert, start, end, part * BLOCK_N, depth, width,
            x_stride, DENSE, EVEN, TMA, K, BLOCK_M // 2, BLOCK_N, BLOCK_K,
        )  # fmt: skip
    else:
        _gate_up_rows(
            x_ptr, weights, topk_weights_ptr, order_ptr, hidden_ptr, expert, start, end, part * BLOCK_N, depth, width,
            x_stride, DENSE, EVEN, TMA, K, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip


@triton.jit
def _down_rows(
    hidden, weights, order_ptr, out_ptr, expert, start, end, first, depth, width, DENSE: tl.constexpr,
    EVEN: tl.constexpr, TMA: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Channels `first`.. of down, of the hidden rows `start` to `end`, of at most `BLOCK_M`."""
    position = start + tl.arange(0, BLOCK_M)
    mask = position < end
    target = position
    if not DENSE:
        target = tl.load(order_ptr + position, mask=mask, other=0)
    out = first + tl.arange(0, BLOCK_N)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if TMA:  # what is past the rows or the channels of an expert is multiplied, and not stored
        for channel in range(0, width, BLOCK_K):
            rows = hidden.load([start, channel])
            acc = dot(rows, tl.trans(weights.load([expert * depth + first, channel])), acc)
    else:
        rows = hidden + position.to(tl.int64)[:, None] * width
        columns = weights + (expert.to(tl.int64) * depth + out)[:, None] * width
        acc = multiply_tile(rows, columns, width, mask[:, None], (out < depth)[:, None], width, acc, EVEN, BLOCK_K)
    place = target.to(tl.int64)[:, None] * depth + out[None, :]
    tl.store(out_ptr + place, acc.to(out_ptr.dtype.element_ty), mask=mask[:, None] & (out < depth)[None, :])


@triton.jit
def _down_kernel(
    hidden,
    half_hidden,
    weights,
    order_ptr,
    tiles_ptr,
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
    TMA: tl.constexpr,
    HALVES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One row of `out_ptr` a choice (where not `DENSE`), already weighted. `hidden` and `half_hidden`: the same rows, in
    blocks (where `TMA`) of a tile and of half a tile."""
    tile, part = _tile_and_slice(num_tiles, slices, group)
    if DENSE:
        expert, start, end = tile * 0, tile * BLOCK_M, rows
    else:
        expert, start, end = _find_tile(tiles_ptr, tile)
        if expert >= num_experts:
            return
    if HALVES and end - start <= BLOCK_M // 2:
        _down_rows(
            half_hidden, weights, order_ptr, out_ptr, expert, start, end, part * BLOCK_N, depth, width,
            DENSE, EVEN, TMA, BLOCK_M // 2, BLOCK_N, BLOCK_K,
        )  # fmt: skip
    else:
        _down_rows(
            hidden, weights, order_ptr, out_ptr, expert, start, end, part * BLOCK_N, depth, width,
            DENSE, EVEN, TMA, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip


@triton.jit
def _sum_choices_kernel(partial_ptr, out_ptr, depth, K: tl.constexpr, BLOCK_N: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    out = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    total = tl.zeros((BLOCK_N,), tl.float32)
    for slot in tl.static_range(K):
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
    tile_rows = chosen["BLOCK_M"]
    through_tma = copies_by_descriptor(x.device) and all(map(_tma_fits, (gate_up, down)))
    if routed:
        choices = topk_experts.numel()
        tiles = choices // tile_rows + min(num_experts, choices)
        order, list_of_tiles = sort_into_tiles(topk_experts, num_experts, tile_rows, tiles)
        target = torch.empty((choices, depth), dtype=x.dtype, device=x.device)
    else:
        choices, target, tiles = rows, out, ceil_div(rows, tile_rows)
        order = list_of_tiles = topk_weights = out  # not read
    hidden = torch.empty((choices, width), dtype=x.dtype, device=x.device)
    up = _constants(chosen, through_tma)
    slices = ceil_div(width, up["BLOCK_N"])
    launch(
        _gate_up_kernel,
        (tiles * slices,),
        x,
        _blocks_of(gate_up, up["BLOCK_N"], up),
        *(topk_weights, order, list_of_tiles, hidden, rows, depth, width, x.stride(0), num_experts),
        *(tiles, slices, min(tiles, chosen["GROUP"])),
        DENSE=not routed,
        EVEN=depth % up["BLOCK_K"] == 0 and width % up["BLOCK_N"] == 0,
        K=choices // rows,
        **up,
    )
    chosen = {**chosen, **{name: chosen[of_down] for name, of_down in OF_DOWN.items()}}
    of_down = _constants(chosen, through_tma)
    slices = ceil_div(depth, of_down["BLOCK_N"])
    launch(
        _down_kernel,
        (tiles * slices,),
        _blocks_of(hidden, tile_rows, of_down),
        _blocks_of(hidden, tile_rows // 2, of_down),
        _blocks_of(down, of_down["BLOCK_N"], of_down),
        *(order, list_of_tiles, target, rows, depth, width, num_experts),
        *(tiles, slices, min(tiles, chosen["GROUP"])),
        DENSE=not routed,
        EVEN=width % of_down["BLOCK_K"] == 0 and depth % of_down["BLOCK_N"] == 0,
        **of_down,
    )
    if routed:
        block = min(2048, next_power_of_2(depth))
        grid_of_sums = (rows, ceil_div(depth, block))
        launch(_sum_choices_kernel, grid_of_sums, target, out, depth, K=choices // rows, BLOCK_N=block, num_warps=8)
    return out


def _constants(blocks: dict[str, int], tma_fits: bool) -> dict[str, int]:
    names = ("BLOCK_M", "BLOCK_N", "BLOCK_K", "num_warps", "num_stages")
    # Half a tile is still what a warp group multiplies by; a quarter would be slower to no end.
    halves = blocks["BLOCK_M"] >= FEWEST_HALVED
    return {name: blocks[name] for name in names} | {"TMA": bool(blocks["TMA"]) and tma_fits, "HALVES": halves}


def _tma_fits(matrix: torch.Tensor) -> bool:
    """Whether the matrix and each of its rows begin at a multiple of what the copy engine moves."""
    return matrix.data_ptr() % TMA_BYTES == 0 and matrix.shape[-1] * matrix.element_size() % TMA_BYTES == 0


def _blocks_of(matrix: torch.Tensor, block_rows: int, constants: dict[str, int]) -> torch.Tensor | TensorDescriptor:
    """`matrix` [.., K] as a kernel of `constants` takes it: itself, or described as rows in blocks of `block_rows`. The
    description is made on the host and travels with the kernel's arguments: a graph keeps a copy of it, streams share nothing,
    and no scratch memory is asked for on the card."""
    if not constants["TMA"]:
        return matrix
    return TensorDescriptor.from_tensor(matrix.view(-1, matrix.shape[-1]), [block_rows, constants["BLOCK_K"]])
