"""The choice of the next token on CUDA: an argmax that uses the whole card for one row; sampling is torch's."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels.launch import ceil_div, launch, next_power_of_2
from kernels.lm_head.reference import sample

__all__ = ["greedy", "sample"]

SLICE = 4096  # logits a program looks at


@triton.jit
def _slice_argmax_kernel(logits_ptr, best_ptr, index_ptr, vocabulary, stride, slices, SLICE: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    token = tl.program_id(1) * SLICE + tl.arange(0, SLICE)
    logits = tl.load(logits_ptr + row * stride + token, mask=token < vocabulary, other=-float("inf")).to(tl.float32)
    place = row * slices + tl.program_id(1)
    tl.store(best_ptr + place, tl.max(logits, axis=0))
    tl.store(index_ptr + place, tl.program_id(1) * SLICE + tl.argmax(logits, axis=0))


@triton.jit
def _join_argmax_kernel(best_ptr, index_ptr, out_ptr, slices, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK)
    best = tl.load(best_ptr + row * slices + lane, mask=lane < slices, other=-float("inf"))
    winner = tl.argmax(best, axis=0)
    tl.store(out_ptr + row, tl.load(index_ptr + row * slices + winner).to(tl.int64))


def greedy(logits: torch.Tensor) -> torch.Tensor:
    """See :func:`kernels.lm_head.greedy`."""
    rows, vocabulary = logits.shape
    slices = ceil_div(vocabulary, SLICE)
    best = torch.empty((rows, slices), dtype=torch.float32, device=logits.device)
    index = torch.empty((rows, slices), dtype=torch.int32, device=logits.device)
    out = torch.empty(rows, dtype=torch.int64, device=logits.device)
    launch(
        _slice_argmax_kernel,
        (rows, slices),
        *(logits, best, index, vocabulary, logits.stride(0), slices),
        SLICE=SLICE,
        num_warps=8,
    )
    launch(_join_argmax_kernel, (rows,), best, index, out, slices, BLOCK=next_power_of_2(slices), num_warps=1)
    return out
