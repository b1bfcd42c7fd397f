"""Expert choice by the four routing rules and the sort that groups rows by expert, in plain torch."""

from __future__ import annotations

import torch

RULES = ("softmax_topk_renorm", "softmax", "softmax_renorm", "sigmoid_bias")


def route(
    logits: torch.Tensor,
    top_k: int,
    rule: str,
    bias: torch.Tensor | None,
    routed_scale: float,
    num_groups: int,
    top_groups: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See :func:`kernels.router.route`."""
    if rule not in RULES:
        raise ValueError(f"unknown routing rule {rule!r}; known: {', '.join(RULES)}")
    sigmoid = rule == "sigmoid_bias"
    scores = logits.float().sigmoid() if sigmoid else logits.float().softmax(-1)  # [T, E]
    choice = scores if bias is None else scores + bias  # [T, E]
    if num_groups > 1:
        choice = _mask_groups(choice, num_groups, top_groups, best=2 if sigmoid else 1)
    experts = choice.topk(top_k, dim=-1).indices  # [T, k]
    weights = scores.gather(1, experts)  # [T, k]
    if rule != "softmax":
        weights = weights / (weights.sum(-1, keepdim=True) + (1e-20 if sigmoid else 0.0))
    return weights * routed_scale, experts


def _mask_groups(choice: torch.Tensor, num_groups: int, top_groups: int, best: int) -> torch.Tensor:
    """`choice` [T, E] with -inf outside the `top_groups` groups whose `best` largest scores add up to most."""
    grouped = choice.unflatten(1, (num_groups, -1))  # [T, G, E/G]
    kept = grouped.topk(best, dim=-1).values.sum(-1).topk(top_groups, dim=-1).indices  # [T, top_groups]
    mask = torch.ones(choice.shape[0], num_groups, dtype=torch.bool, device=choice.device).scatter_(1, kept, False)
    return grouped.masked_fill(mask.unsqueeze(-1), float("-inf")).flatten(1)


def sort_by_expert(experts: torch.Tensor, num_experts: int) -> tuple[torch.Tensor, torch.Tensor]:
    """See :func:`kernels.router.sort_by_expert`."""
    flat = experts.flatten()
    order = flat.argsort(stable=True)  # [T*k]
    offsets = torch.zeros(num_experts + 1, dtype=torch.int64, device=experts.device)
    offsets[1:] = torch.bincount(flat, minlength=num_experts).cumsum(0)
    return order, offsets
