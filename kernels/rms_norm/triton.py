"""RMSNorm on CUDA: whole rows in registers, several short rows to a program."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels.launch import ceil_div, launch, next_power_of_2


@triton.jit
def _rms_norm_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    out_ptr,
    sum_ptr,
    rows,
    width,
    eps,
    x_stride,
    residual_stride,
    HAS_RESIDUAL: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]  # [ROWS, 1]
    column = tl.arange(0, BLOCK_D)[None, :]  # [1, BLOCK_D]
    mask = (row < rows) & (column < width)
    wide = tl.load(x_ptr + row * x_stride + column, mask=mask, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        wide += tl.load(residual_ptr + row * residual_stride + column, mask=mask, other=0.0).to(tl.float32)
        total = wide.to(sum_ptr.dtype.element_ty)
        tl.store(sum_ptr + row * width + column, total, mask=mask)
        wide = total.to(tl.float32)
    variance = tl.sum(wide * wide, axis=1) / width  # [ROWS]
    normed = wide * (1.0 / tl.sqrt(variance + eps))[:, None]
    # Rounded to x's type before the weight, as `transformers` does.
    normed = normed.to(out_ptr.dtype.element_ty).to(tl.float32)
    weight = tl.load(weight_ptr + column, mask=column < width, other=0.0).to(tl.float32)
    tl.store(out_ptr + row * width + column, (normed * weight).to(out_ptr.dtype.element_ty), mask=mask)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """See :func:`kernels.rms_norm.rms_norm`; rows of `x` may lie apart (a slice of a wider tensor)."""
    return _run(x, None, weight, eps)[0]


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """See :func:`kernels.rms_norm.add_rms_norm`."""
    return _run(x, residual, weight, eps)


def _run(
    x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    rows, width = x.shape
    out = torch.empty((rows, width), dtype=x.dtype, device=x.device)
    total = out if residual is None else torch.empty_like(out)
    block = next_power_of_2(width)
    tile_rows = max(1, min(1024 // block, 16))
    other = x if residual is None else residual
    launch(
        _rms_norm_kernel,
        (ceil_div(rows, tile_rows),),
        x,
        other,
        weight,
        out,
        total,
        rows,
        width,
        eps,
        x.stride(0),
        other.stride(0),
        HAS_RESIDUAL=residual is not None,
        ROWS=tile_rows,
        BLOCK_D=block,
        num_warps=8 if block >= 4096 else 4,
    )
    return out, total
