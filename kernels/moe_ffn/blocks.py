"""Which kernels a number of rows is for, and the names of their block sizes."""

from __future__ import annotations

SMALL_ROWS = 16  # up to which nothing is sorted
ALL_TILES = 1 << 16  # a GROUP that holds every tile of rows

# Of the kernels for many rows: gate and up's, and what the same of down is called.
OF_DOWN = {
    "BLOCK_M": "DOWN_M",
    "BLOCK_N": "DOWN_N",
    "BLOCK_K": "DOWN_K",
    "GROUP": "DOWN_GROUP",
    "num_warps": "down_warps",
    "num_stages": "down_stages",
}
