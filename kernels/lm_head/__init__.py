"""The choice of the next token: greedy, or sampled with a temperature from the nucleus of mass `top_p`."""

from __future__ import annotations

import torch

from kernels.dispatch import cuda_form
from kernels.lm_head import reference as host_form


def greedy(logits: torch.Tensor) -> torch.Tensor:
    """The first index of the largest of `logits` [T, V] in each row: [T] int64."""
    return (cuda_form(__name__) if logits.is_cuda else host_form).greedy(logits)


def sample(
    logits: torch.Tensor, temperature: float, top_p: float, generator: torch.Generator | None = None
) -> torch.Tensor:
    """One token a row drawn from softmax(`logits` [T, V] / temperature), cut to the smallest set of most likely tokens
    whose mass reaches `top_p` (arXiv 1904.09751). Temperature 0 is greedy. Result [T] int64."""
    return (cuda_form(__name__) if logits.is_cuda else host_form).sample(logits, temperature, top_p, generator)
