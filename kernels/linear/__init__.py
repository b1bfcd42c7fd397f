"""Matrix products with weights packed once for the machine: oneDNN's blocked layout on the CPU.

Measured on an AVX-512 core at 1 to 8 rows, float32: packed 11-17 GB/s of weights, `torch.nn.functional.linear` 4-8.
"""

from __future__ import annotations

from kernels.linear.cpu import linear, pack, packed_bytes, padding

__all__ = ["linear", "pack", "packed_bytes", "padding"]
