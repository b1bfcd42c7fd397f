"""The resident FFN executor: one kernel that stays on the card and runs any layer of any model on request.

`ResidentFFN` needs Triton (CUDA, or the interpreter) and is imported on first use; `ffn_layer` is what it computes, in
plain torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kernels.resident_ffn.layers import FFNLayer
from kernels.resident_ffn.reference import ffn_layer

if TYPE_CHECKING:
    from kernels.resident_ffn.executor import ResidentFFN

__all__ = ["FFNLayer", "ResidentFFN", "ffn_layer"]


def __getattr__(name: str) -> Any:
    if name == "ResidentFFN":
        from kernels.resident_ffn.executor import ResidentFFN

        return ResidentFFN
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
