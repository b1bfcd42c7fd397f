"""The two matrix products of a SwiGLU expert as tiles, for kernels that come by their rows and weights in any way."""

from __future__ import annotations

import triton
import triton.language as tl

from kernels.tile import dot, silu


@triton.jit
def multiply_tile(a, b_ptr, row_stride, a_mask, b_mask, depth, acc, EVEN: tl.constexpr, BLOCK_K: tl.constexpr):
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
    weights,
    top,
    first,
    width,
    depth,
    row_mask,
    EVEN: tl.constexpr,
    TMA: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """silu(gate x) * (up x) [M, N] in float32: rows at pointers `x` [M, 1], output channels `first`.. of `width`, weights
    [2 * width, depth] from row `top` of `weights` on, a pointer or (`TMA`) a descriptor of blocks [N, K]. `EVEN`: the blocks
    divide both sizes, so only rows are masked."""
    out = first + tl.arange(0, BLOCK_N)
    lane = tl.arange(0, BLOCK_K)[None, :]
    inside = (out < width)[:, None]
    if not TMA:
        gate_row = weights + (top + out).to(tl.int64)[:, None] * depth
        up_row = gate_row + tl.cast(width, tl.int64) * depth
    gate = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    up = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, depth, BLOCK_K):
        channel = start + lane
        if EVEN:
            rows = tl.load(x + channel, mask=row_mask, other=0.0)
        else:
            rows = tl.load(x + channel, mask=row_mask & (channel < depth), other=0.0)
        if TMA:  # channels past `depth` are read as 0, rows past `width` as what is there
            gate_weight = weights.load([top + first, start])
            up_weight = weights.load([top + width + first, start])
        elif EVEN:
            gate_weight = tl.load(gate_row + channel)
            up_weight = tl.load(up_row + channel)
        else:
            gate_weight = tl.load(gate_row + channel, mask=inside & (channel < depth), other=0.0)
            up_weight = tl.load(up_row + channel, mask=inside & (channel < depth), other=0.0)
        gate = dot(rows, tl.trans(gate_weight), gate)
        up = dot(rows, tl.trans(up_weight), up)
    return silu(gate) * up


def evenness(depth: int, width: int, chosen: dict[str, int]) -> tuple[bool, bool]:
    """Whether blocks divide the sizes, for gate and up and for down."""
    block_k = chosen["BLOCK_K"]
    return (
        depth % block_k == 0 and width % chosen["BLOCK_N"] == 0,
        width % block_k == 0 and depth % chosen["DOWN_N"] == 0,
    )
