"""The routed FFN on the CPU: each chosen expert's packed weights are read once, and rows are gathered, never weights.

`weights` may hold packed matrices, one an expert (:func:`kernels.linear.pack`), or plain stacked ones. With few rows the
count of operations decides: rows are grouped in plain Python, and what does not touch weights is done once for all experts.
With many, each expert's rows stay in cache from one product to the next.
"""

from __future__ import annotations

import torch

from kernels.dense_ffn.cpu import activate, dense_ffn
from kernels.linear import linear, padding
from kernels.moe_ffn.weights import ExpertWeights
from kernels.router.reference import sort_by_expert

_FEW_CHOICES = 256  # (row, expert) pairs up to which Python groups faster than tensors do


def moe_ffn(
    x: torch.Tensor, weights: ExpertWeights, topk_weights: torch.Tensor, topk_experts: torch.Tensor
) -> torch.Tensor:
    """See :func:`kernels.moe_ffn.moe_ffn`."""
    form = _few_rows if topk_experts.numel() <= _FEW_CHOICES else _many_rows
    return form(x, weights, topk_weights.to(x.dtype), topk_experts)


def _few_rows(
    x: torch.Tensor, weights: ExpertWeights, topk_weights: torch.Tensor, topk_experts: torch.Tensor
) -> torch.Tensor:
    rows, top_k = topk_experts.shape
    choices_of: dict[int, list[int]] = {}
    for choice, expert in enumerate(topk_experts.flatten().tolist()):
        choices_of.setdefault(expert, []).append(choice)
    gathered: list[int] = []  # rows of x, expert after expert
    place = [0] * (rows * top_k)  # of each choice in `gathered`
    counts = []
    for choices in choices_of.values():
        for choice in choices:
            place[choice] = len(gathered)
            gathered.append(choice // top_k)
        extra = padding(len(choices))
        gathered += gathered[-1:] * extra
        counts.append(len(choices) + extra)
    inputs = x.index_select(0, torch.tensor(gathered)).split(counts)
    gate_up = [linear(mine, weights.gate_up[expert]) for mine, expert in zip(inputs, choices_of, strict=True)]
    activated = activate(torch.cat(gate_up)).split(counts)
    outputs = [linear(mine, weights.down[expert]) for mine, expert in zip(activated, choices_of, strict=True)]
    chosen = torch.cat(outputs).index_select(0, torch.tensor(place)).view(rows, top_k, -1)  # [T, k, D]
    return chosen.mul_(topk_weights.unsqueeze(-1)).sum(1)


def _many_rows(
    x: torch.Tensor, weights: ExpertWeights, topk_weights: torch.Tensor, topk_experts: torch.Tensor
) -> torch.Tensor:
    order, offsets = sort_by_expert(topk_experts, len(weights.gate_up))
    rows = order.div(topk_experts.shape[1], rounding_mode="floor")
    factor = topk_weights.flatten().index_select(0, order).unsqueeze(1)
    counts = offsets.diff().tolist()
    out = torch.zeros_like(x)
    for expert, (mine, scale) in enumerate(zip(rows.split(counts), factor.split(counts), strict=True)):
        if mine.numel():
            result = dense_ffn(x.index_select(0, mine), weights.gate_up[expert], weights.down[expert])
            out.index_add_(0, mine, result.mul_(scale))
    return out
