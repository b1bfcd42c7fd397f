"""The dense SwiGLU FFN on the CPU, over weights that are packed (:func:`kernels.linear.pack`) or plain."""

from __future__ import annotations

import torch

from kernels import native
from kernels.linear import linear


def dense_ffn(x: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
    """See :func:`kernels.dense_ffn.dense_ffn`."""
    if gate_up.is_mkldnn and native.serves(x.dtype, gate_up.shape, down.shape):
        return native.dense_ffn(x, gate_up, down)
    return linear(activate(linear(x, gate_up)), down)


def activate(gate_up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up of `gate_up` [T, 2W]: [T, W]."""
    gate, up = gate_up.chunk(2, dim=1)
    return torch.nn.functional.silu(gate).mul_(up)
