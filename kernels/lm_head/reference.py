"""The choice of the next token from logits in plain torch."""

from __future__ import annotations

import torch


def greedy(logits: torch.Tensor) -> torch.Tensor:
    """See :func:`kernels.lm_head.greedy`."""
    return logits.float().argmax(-1)


def sample(
    logits: torch.Tensor, temperature: float, top_p: float, generator: torch.Generator | None = None
) -> torch.Tensor:
    """See :func:`kernels.lm_head.sample`."""
    if temperature == 0.0:
        return greedy(logits)
    probabilities = (logits.float() / temperature).softmax(-1)  # [T, V]
    if top_p < 1.0:
        ranked, token = probabilities.sort(-1, descending=True)
        # A token is kept while the mass before it is below top_p: the first is always kept.
        ranked = ranked.masked_fill(ranked.cumsum(-1) - ranked >= top_p, 0.0)
        probabilities = torch.zeros_like(probabilities).scatter_(-1, token, ranked)
    return torch.multinomial(probabilities, 1, generator=generator).squeeze(-1)  # [T]
