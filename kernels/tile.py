"""What several Triton kernels share: the matrix product, and the look-up of cache slots."""

from __future__ import annotations

import os

import triton
import triton.language as tl

# Triton's interpreter holds bfloat16 as 16-bit integers and would multiply those.
INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET", "0") == "1")
LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def dot(a, b, acc):
    """`acc + a @ b` in float32; float32 operands are multiplied as such, not as TF32."""
    if INTERPRETED:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def silu(x):
    return x / (1.0 + tl.exp(-x))
