"""How oneDNN packs weights, as far as the loops here rely on it; nothing is compiled to find that out."""

from __future__ import annotations

import ctypes

import torch

BLOCK = 64  # output features that a tile computes
_K_BLOCK = {torch.float32: 16, torch.bfloat16: 32}  # columns are padded to these


def address(packed: torch.Tensor) -> int:
    """Where the data of a packed weight lies; it stays there as long as the tensor lives."""
    return torch.ops.mkldnn.data_ptr(packed)


def packed_as_read(dtype: torch.dtype) -> bool:
    """Whether this machine packs as `[N/64][K][64]`, in bfloat16 `[N/64][K/2][64][2]`: packs a matrix and looks."""
    block, steps = _K_BLOCK[dtype], 2 if dtype == torch.bfloat16 else 1
    weight = torch.arange(2 * BLOCK * 3 * block).remainder(251).to(dtype).view(2 * BLOCK, 3 * block)
    packed = torch.ops.mkldnn._reorder_linear_weight(weight)
    if torch.ops.mkldnn._nbytes(packed) != weight.nbytes:
        return False
    stored = torch.frombuffer((ctypes.c_char * weight.nbytes).from_address(address(packed)), dtype=dtype)
    wanted = weight.view(2, BLOCK, -1, steps).transpose(1, 2)  # [N / 64, K / steps, 64, steps]
    return torch.equal(stored, wanted.flatten())
