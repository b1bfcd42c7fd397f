"""RMSNorm on the CPU in as few operations as torch allows; the rounding is that of `transformers`."""

from __future__ import annotations

import torch


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """`x` [..., D] normalised over D in float32, then times `weight` [D]; result in x's dtype.

    One reduction gives the norm's root of squares; `torch.nn.functional.rms_norm` takes six operations for the same.
    """
    wide = x.float()
    root = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)  # sqrt(sum x^2)
    scale = torch.rsqrt(torch.addcmul(_constant(eps), root, root, value=1.0 / x.shape[-1]))
    return (wide * scale).to(x.dtype) * weight


_constants: dict[float, torch.Tensor] = {}


def _constant(value: float) -> torch.Tensor:
    if value not in _constants:
        _constants[value] = torch.tensor(value)
    return _constants[value]
