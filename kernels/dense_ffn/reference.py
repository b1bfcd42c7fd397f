"""The SwiGLU FFN (arXiv 2002.05202, eq. 6) in plain torch, float32 throughout."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def swiglu(x: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
    """`down (silu(gate x) * up x)` in the operands' dtype: x [T, D], gate_up [2W, D], down [D, W] -> [T, D]."""
    gate, up = F.linear(x, gate_up).chunk(2, dim=-1)  # each [T, W]
    return F.linear(F.silu(gate) * up, down)  # [T, D]


def dense_ffn(x: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
    """See :func:`kernels.dense_ffn.dense_ffn`."""
    return swiglu(x.float(), gate_up.float(), down.float()).to(x.dtype)
