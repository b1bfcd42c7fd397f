"""Linear layers whose weights oneDNN has packed: by our own loop, or by oneDNN where that is faster or the loop does not serve."""

from __future__ import annotations

import torch

from kernels import native

_ROW_BLOCK = 64  # output features of a block
_COLUMN_BLOCK = {torch.float32: 16, torch.bfloat16: 32, torch.float16: 32}
_reorder = torch.ops.mkldnn._reorder_linear_weight.default
_linear_pointwise = torch.ops.mkldnn._linear_pointwise.default

# From here on oneDNN multiplies bfloat16 faster, our loop takes up to 1.4 times as long. In float32 both take the same (the loop 0.90
# to 1.08 times as long, 65 to 512 rows of seven shapes), but oneDNN prepares itself anew for each number of rows, 1 ms a shape:
# every prompt of a length not met before would pay that for each of its shapes.
_MOST_NATIVE_ROWS = {torch.bfloat16: 64}

# oneDNN's kernels for 3 to 6 rows stream packed weights faster than those for 1 or 2 (float32 on an AVX-512 core: 16 GB/s
# against 11 to 13), so that fewer rows are given copies for company.
_FEWEST_GOOD_ROWS = 3
_PADDED_ROWS = 4


def pack(weight: torch.Tensor) -> torch.Tensor:
    """`weight` [N, K] copied into oneDNN's blocked layout: an opaque tensor of the same shape, for :func:`linear`."""
    native.available(weight.dtype)  # compiles now what `linear` will call
    return _reorder(weight.contiguous())


def linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """`x` [T, K] times the transpose of `weight` [N, K], packed or plain: [T, N]."""
    if not weight.is_mkldnn:
        return torch.nn.functional.linear(x, weight)
    rows = x.shape[0]
    if rows <= _MOST_NATIVE_ROWS.get(x.dtype, rows) and native.serves(x.dtype, weight.shape):
        return native.linear(x, weight)
    if rows >= _FEWEST_GOOD_ROWS:
        return _linear_pointwise(x, weight, None, "none", [], "")
    return _linear_pointwise(torch.cat([x] * (_PADDED_ROWS // rows)), weight, None, "none", [], "")[:rows]


def packed_bytes(rows: int, columns: int, dtype: torch.dtype) -> int:
    """Bytes of a packed [rows, columns]: both rounded up to the blocks of oneDNN's layout."""
    column_block = _COLUMN_BLOCK[dtype]
    padded_rows = -(-rows // _ROW_BLOCK) * _ROW_BLOCK
    padded_columns = -(-columns // column_block) * column_block
    return padded_rows * padded_columns * dtype.itemsize
