"""oneDNN's packed linear layers, as torch exposes them."""

from __future__ import annotations

import torch

_ROW_BLOCK = 64  # output features of a block
_COLUMN_BLOCK = {torch.float32: 16, torch.bfloat16: 32, torch.float16: 32}
_reorder = torch.ops.mkldnn._reorder_linear_weight
_linear_pointwise = torch.ops.mkldnn._linear_pointwise


def pack(weight: torch.Tensor) -> torch.Tensor:
    """`weight` [N, K] copied into oneDNN's blocked layout: an opaque tensor for :func:`linear`."""
    return _reorder(weight.contiguous())


def linear(x: torch.Tensor, packed: torch.Tensor) -> torch.Tensor:
    """`x` [T, K] times the transpose of the packed [N, K]: [T, N]."""
    return _linear_pointwise(x, packed, None, "none", [], "")


def packed_bytes(rows: int, columns: int, dtype: torch.dtype) -> int:
    """Bytes of a packed [rows, columns]: both rounded up to the blocks of oneDNN's layout."""
    column_block = _COLUMN_BLOCK[dtype]
    padded_rows = -(-rows // _ROW_BLOCK) * _ROW_BLOCK
    padded_columns = -(-columns // column_block) * column_block
    return padded_rows * padded_columns * dtype.itemsize
