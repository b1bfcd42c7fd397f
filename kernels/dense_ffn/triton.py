"""The dense SwiGLU FFN on CUDA: the routed FFN's kernels with one expert that every row chose."""

from __future__ import annotations

import torch

from kernels.moe_ffn.triton import dense


def dense_ffn(x: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
    """See :func:`kernels.dense_ffn.dense_ffn`."""
    return dense(x, gate_up, down)
