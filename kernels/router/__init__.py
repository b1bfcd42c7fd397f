"""The router: which experts each token goes to, with what weight, and the tokens grouped by expert."""

from __future__ import annotations

import torch

from kernels.dispatch import cuda_form
from kernels.router import cpu as host_form


def route(
    logits: torch.Tensor,
    top_k: int,
    rule: str,
    bias: torch.Tensor | None = None,
    routed_scale: float = 1.0,
    num_groups: int = 1,
    top_groups: int = 1,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose `top_k` experts for each row of `logits` [T, E] float32 by one of the four rules.

    `softmax_topk_renorm` and `softmax_renorm` renormalise the chosen probabilities, `softmax` takes them as they are, and
    `sigmoid_bias` chooses by sigmoid + `bias` [E] and weighs by the sigmoid alone, renormalised. With `num_groups > 1`
    only experts of the best `top_groups` groups may be chosen (DeepSeek-V2's and -V3's device-limited routing). Returns
    (weights [T, k] float32 times `routed_scale`, experts [T, k] int64). Raises ValueError for an unknown rule.
    """
    form = cuda_form(__name__) if logits.is_cuda else host_form
    return form.route(logits, top_k, rule, bias, routed_scale, num_groups, top_groups)


def sort_by_expert(experts: torch.Tensor, num_experts: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Group the T*k choices of `experts` [T, k] by expert, stably: (order [T*k] int64, offsets [E + 1] int64). The
    choices of expert e are `order[offsets[e] : offsets[e + 1]]`, indices into `experts.flatten()`."""
    return (cuda_form(__name__) if experts.is_cuda else host_form).sort_by_expert(experts, num_experts)
