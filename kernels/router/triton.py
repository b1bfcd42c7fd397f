"""Routing and expert sorting on CUDA: one small launch each, no atomics, so the order is the reference's."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels.launch import ceil_div, launch, next_power_of_2
from kernels.router.reference import RULES

SORT_CHUNK = 4096  # choices that one step of the sort looks at
NEVER = tl.constexpr(float("-inf"))


@triton.jit
def _best_groups(choice, expert, num_experts, num_groups, top_groups, PAIRS: tl.constexpr, GROUPS: tl.constexpr):
    """`choice` [T, E] with -inf outside the best groups; a group scores its largest, or (`PAIRS`) its largest two."""
    group_of = expert // (num_experts // num_groups)  # [1, E]
    slot = tl.arange(0, GROUPS)[None, :]
    scores = tl.full((choice.shape[0], GROUPS), NEVER, tl.float32)
    for group in range(num_groups):
        member = tl.where((group_of == group) & (expert < num_experts), choice, NEVER)
        score = tl.max(member, axis=1)
        if PAIRS:
            first = tl.argmax(member, axis=1)
            score += tl.max(tl.where(expert == first[:, None], NEVER, member), axis=1)
        scores = tl.where(slot == group, score[:, None], scores)
    allowed = tl.full(choice.shape, NEVER, tl.float32)
    for _ in range(top_groups):
        best = tl.argmax(scores, axis=1)[:, None]
        allowed = tl.where(group_of == best, choice, allowed)
        scores = tl.where(slot == best, NEVER, scores)
    return allowed


@triton.jit
def score_experts(logits, bias, rule, num_experts, num_groups, top_groups, GROUPS: tl.constexpr):
    """(scores, what they are chosen by) [T, E], for `logits` [T, E], -inf past the last expert; the latter is -inf where an
    expert may not be chosen. `rule` is an index into `RULES`; it, and every count, may be a run-time value: the resident
    executor serves models of several rules."""
    expert = tl.arange(0, logits.shape[1])[None, :]
    # rule 3 is sigmoid_bias
    top = tl.maximum(tl.max(logits, axis=1), -1e30)[:, None]  # finite even where there is no expert at all
    exponent = tl.exp(logits - top)
    scores = exponent / tl.maximum(tl.sum(exponent, axis=1), 1e-30)[:, None]
    if rule == 3:
        scores = 1.0 / (1.0 + tl.exp(-logits))
    choice = tl.where(expert < num_experts, scores + bias, NEVER)
    if num_groups > 1:
        if rule == 3:
            choice = _best_groups(choice, expert, num_experts, num_groups, top_groups, True, GROUPS)
        else:
            choice = _best_groups(choice, expert, num_experts, num_groups, top_groups, False, GROUPS)
    return scores, choice


@triton.jit
def choose_experts(
    logits,
    bias,
    rule,
    top_k,
    routed_scale,
    num_experts,
    num_groups,
    top_groups,
    GROUPS: tl.constexpr,
    TOP_K: tl.constexpr,
):
    """Weights [T, TOP_K] and experts [T, TOP_K] int32 (-1 beyond `top_k`), as :func:`score_experts` scores them."""
    expert = tl.arange(0, logits.shape[1])[None, :]
    slot = tl.arange(0, TOP_K)[None, :]
    scores, choice = score_experts(logits, bias, rule, num_experts, num_groups, top_groups, GROUPS)
    weights = tl.zeros((logits.shape[0], TOP_K), tl.float32)
    experts = tl.full((logits.shape[0], TOP_K), -1, tl.int32)
    for rank in range(top_k):
        best = tl.argmax(choice, axis=1)[:, None]  # [T, 1]
        score = tl.sum(tl.where(expert == best, scores, 0.0), axis=1)[:, None]
        weights = tl.where(slot == rank, score, weights)
        experts = tl.where(slot == rank, best, experts)
        choice = tl.where(expert == best, NEVER, choice)
    if rule != 1:  # the only one that keeps the weights as they are
        weights /= tl.sum(weights, axis=1)[:, None] + 1e-20
    return weights * routed_scale, experts


@triton.jit
def spread_experts(
    logits, bias, rule, top_k, routed_scale, num_experts, num_groups, top_groups, GROUPS: tl.constexpr,
):  # fmt: skip
    """The same choice as (weights, is it chosen) [T, E] each: what :func:`choose_experts` lists, without the work of a list."""
    expert = tl.arange(0, logits.shape[1])[None, :]
    scores, choice = score_experts(logits, bias, rule, num_experts, num_groups, top_groups, GROUPS)
    chosen = tl.zeros(logits.shape, tl.int32)
    for _ in range(top_k):
        best = expert == tl.argmax(choice, axis=1)[:, None]
        chosen = tl.where(best, 1, chosen)
        choice = tl.where(best, NEVER, choice)
    weights = tl.where(chosen == 1, scores, 0.0)
    if rule != 1:
        weights /= tl.sum(weights, axis=1)[:, None] + 1e-20
    return weights * routed_scale, chosen


@triton.jit
def _route_kernel(
    logits_ptr,
    bias_ptr,
    weights_ptr,
    experts_ptr,
    rows,
    num_experts,
    routed_scale,
    RULE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    NUM_GROUPS: tl.constexpr,
    TOP_GROUPS: tl.constexpr,
    GROUPS: tl.constexpr,
    K: tl.constexpr,
    TOP_K: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    expert = tl.arange(0, BLOCK_E)[None, :]
    mask = (row < rows) & (expert < num_experts)
    logits = tl.load(logits_ptr + row * num_experts + expert, mask=mask, other=NEVER)
    logits = tl.where(row < rows, logits, 0.0)
    bias = tl.zeros((1, BLOCK_E), tl.float32)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + expert, mask=expert < num_experts, other=0.0).to(tl.float32)
    weights, experts = choose_experts(
        logits, bias, RULE, K, routed_scale, num_experts, NUM_GROUPS, TOP_GROUPS, GROUPS, TOP_K
    )
    slot = tl.arange(0, TOP_K)[None, :]
    inside = (row < rows) & (slot < K)
    tl.store(weights_ptr + row * K + slot, weights, mask=inside)
    tl.store(experts_ptr + row * K + slot, experts.to(tl.int64), mask=inside)


@triton.jit
def _sort_kernel(experts_ptr, order_ptr, offsets_ptr, num_choices, num_experts, CHUNK: tl.constexpr):
    """Program e: how many choices go to experts below e, then where each of its own lies."""
    expert = tl.program_id(0)
    lane = tl.arange(0, CHUNK)
    below = tl.zeros((CHUNK,), tl.int32)
    for start in range(0, num_choices, CHUNK):
        choice = tl.load(experts_ptr + start + lane, mask=start + lane < num_choices, other=num_experts)
        below += (choice < expert).to(tl.int32)
    first = tl.sum(below)
    tl.store(offsets_ptr + expert, first.to(tl.int64))
    for start in range(0, num_choices, CHUNK):
        choice = tl.load(experts_ptr + start + lane, mask=start + lane < num_choices, other=num_experts)
        mine = (choice == expert).to(tl.int32)
        place = first + tl.cumsum(mine, axis=0) - 1
        tl.store(order_ptr + place, (start + lane).to(tl.int64), mask=mine == 1)
        first += tl.sum(mine)
    if expert == num_experts - 1:
        tl.store(offsets_ptr + num_experts, tl.full((), 0, tl.int64) + num_choices)


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
    logits = logits.contiguous()
    rows, num_experts = logits.shape
    weights = torch.empty((rows, top_k), dtype=torch.float32, device=logits.device)
    experts = torch.empty((rows, top_k), dtype=torch.int64, device=logits.device)
    tile_rows = 1 if rows < 512 else 4
    launch(
        _route_kernel,
        (ceil_div(rows, tile_rows),),
        logits,
        logits if bias is None else bias,
        weights,
        experts,
        rows,
        num_experts,
        routed_scale,
        RULE=RULES.index(rule),
        HAS_BIAS=bias is not None,
        NUM_GROUPS=num_groups,
        TOP_GROUPS=top_groups,
        GROUPS=next_power_of_2(num_groups),
        K=top_k,
        TOP_K=next_power_of_2(top_k),
        ROWS=tile_rows,
        BLOCK_E=next_power_of_2(num_experts),
        num_warps=1 if tile_rows == 1 else 4,
    )
    return weights, experts


def sort_by_expert(experts: torch.Tensor, num_experts: int) -> tuple[torch.Tensor, torch.Tensor]:
    """See :func:`kernels.router.sort_by_expert`."""
    experts = experts.contiguous()
    order = torch.empty(experts.numel(), dtype=torch.int64, device=experts.device)
    chunk = max(16, min(SORT_CHUNK, next_power_of_2(experts.numel())))
    offsets = torch.empty(num_experts + 1, dtype=torch.int64, device=experts.device)
    launch(
        _sort_kernel,
        (num_experts,),
        experts,
        order,
        offsets,
        experts.numel(),
        num_experts,
        CHUNK=chunk,
        num_warps=8 if chunk == SORT_CHUNK else 4,
    )
    return order, offsets
