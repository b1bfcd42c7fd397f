"""Matrix products with weights packed once for the machine: oneDNN's blocked layout on the CPU.

Measured on one AVX-512 core that streams 28 GB/s, float32, 1 to 8 rows: 20 to 27 GB/s of weights by our own loop over the
packed layout (:mod:`kernels.native`), 12 to 20 by oneDNN's kernels, 10 to 18 by `torch.nn.functional.linear`.
"""

from __future__ import annotations

from kernels.linear.cpu import linear, pack, packed_bytes

__all__ = ["linear", "pack", "packed_bytes"]
