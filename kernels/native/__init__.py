"""Machine code for the CPU, made for few rows: products with packed weights and the whole routed FFN, each one call.

With one to a few rows a product is a stream of weights, and what counts is how near to the memory's speed it is read.
oneDNN's kernels reach half to three quarters of it; the loop here (a block of 64 outputs in registers, the packed weights
read once and in order) 80 to 95 %. A whole FFN in one call also leaves no Python that grows with the number of experts.

The weights stay in oneDNN's layout, so that bfloat16 products of many rows, and all where this does not serve, go on using
its kernels: `[N/64][K][64]` in float32, `[N/64][K/2][64][2]` in bfloat16. :func:`available` packs a matrix and looks; where the
layout is another one (a machine without AVX-512, and with AMX in bfloat16), everything here is left alone. The tile is LLVM
code by way of Numba. One thread, and the interpreter lock is released.
Without Numba, too, everything here is left alone.
"""

from __future__ import annotations

import functools

import torch

from kernels.native.layout import address

__all__ = ["address", "available", "dense_ffn", "linear", "routed_ffn", "serves"]


@functools.cache
def _code():
    from kernels.native import code  # importing Numba takes a third of a second, which only the CPU's forms should pay

    return code


@functools.cache
def available(dtype: torch.dtype) -> bool:
    """Whether Numba is here, this machine has the instructions, and what is compiled gives the right results."""
    try:
        return _code().works(dtype)
    except ImportError:
        return False


def serves(dtype: torch.dtype, *shapes: tuple[int, int]) -> bool:
    """Whether products with packed weights of these shapes [N, K] may come here: one thread, whole steps of a tile, and more
    than one output (oneDNN does not block a single one)."""
    if torch.get_num_threads() > 1 or not available(dtype):
        return False
    step = 2 if dtype == torch.bfloat16 else 1
    return all(outputs > 1 and columns % step == 0 for outputs, columns in shapes)


def linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """`x` [T, K] times the transpose of packed `weight` [N, K]: [T, N] in x's dtype, summed in float32."""
    return _code().linear(x, weight)


def dense_ffn(x: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
    """:func:`kernels.dense_ffn.dense_ffn` of packed weights."""
    return _code().dense_ffn(x, gate_up, down)


def routed_ffn(x, gate_up_addresses, down_addresses, width: int, topk_weights, topk_experts) -> torch.Tensor:
    """:func:`kernels.moe_ffn.moe_ffn` of packed experts of `width`, given by their addresses [E] int64."""
    return _code().routed_ffn(x, gate_up_addresses, down_addresses, width, topk_weights, topk_experts)
