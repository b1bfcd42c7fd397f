"""The dense SwiGLU FFN on CUDA: for few rows the routed FFN's kernels with one expert that every row chose, which read
each weight once; for many, the vendor's products with the activation between them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from kernels.launch import ceil_div, launch
from kernels.moe_ffn.triton import dense
from kernels.tile import silu

VENDOR_ROWS = 256  # from here on the products are bound by arithmetic
BLOCK = 1024


@triton.jit
def _silu_multiply_kernel(gate_up_ptr, out_ptr, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    channel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    source = gate_up_ptr + row * 2 * width + channel
    gate = tl.load(source, mask=channel < width, other=0.0).to(tl.float32)
    up = tl.load(source + width, mask=channel < width, other=0.0).to(tl.float32)
    tl.store(out_ptr + row * width + channel, (silu(gate) * up).to(out_ptr.dtype.element_ty), mask=channel < width)


def dense_ffn(x: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
    """See :func:`kernels.dense_ffn.dense_ffn`."""
    rows, width = x.shape[0], down.shape[1]
    if rows < VENDOR_ROWS:
        return dense(x, gate_up, down)
    joined = F.linear(x, gate_up)  # [T, 2W]
    hidden = torch.empty((rows, width), dtype=x.dtype, device=x.device)
    launch(_silu_multiply_kernel, (rows, ceil_div(width, BLOCK)), joined, hidden, width, BLOCK=BLOCK, num_warps=4)
    return F.linear(hidden, down)
