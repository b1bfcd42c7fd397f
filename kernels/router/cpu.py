"""The router on the CPU: two operations where the rule allows it, the reference's where it does not."""

from __future__ import annotations

import torch

from kernels.router.reference import route as reference_route
from kernels.router.reference import sort_by_expert

__all__ = ["route", "sort_by_expert"]


def route(
    logits: torch.Tensor,
    top_k: int,
    rule: str,
    bias: torch.Tensor | None,
    routed_scale: float,
    num_groups: int,
    top_groups: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See :func:`kernels.router.route`. Renormalising the k largest probabilities is the softmax of the k largest logits."""
    if num_groups > 1 or bias is not None or rule not in ("softmax", "softmax_renorm", "softmax_topk_renorm"):
        return reference_route(logits, top_k, rule, bias, routed_scale, num_groups, top_groups)
    if rule == "softmax":
        weights, experts = logits.softmax(-1).topk(top_k, dim=-1)
    else:
        largest, experts = logits.topk(top_k, dim=-1)
        weights = largest.softmax(-1)
    return (weights if routed_scale == 1.0 else weights.mul_(routed_scale)), experts
