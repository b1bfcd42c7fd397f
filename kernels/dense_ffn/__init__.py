"""The dense SwiGLU FFN: dense layers, and all shared experts of a layer joined into one."""

from __future__ import annotations

import torch

from kernels.dense_ffn import cpu as host_form
from kernels.dispatch import cuda_form


def dense_ffn(x: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
    """`down (silu(gate x) * up x)`: `x` [T, D], `gate_up` [2W, D] (gate's rows, then up's), `down` [D, W] -> [T, D]."""
    return (cuda_form(__name__) if x.is_cuda else host_form).dense_ffn(x, gate_up, down)
