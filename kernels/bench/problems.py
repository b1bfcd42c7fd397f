"""The bench's problems: for each operator, inputs at a given size, the calls to time, what they must give, and the bytes and
operations that they cost by formula.

Bytes are those that must move: each weight of each expert that is hit once, the KV once, activations once. Peers are what
torch offers for the same job; a peer may take its inputs in the layout that it likes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

from kernels import attention, dense_ffn, lm_head, mla, moe_ffn, rms_norm, rope, router
from kernels.attention import reference as attention_reference
from kernels.dense_ffn import reference as dense_reference
from kernels.lm_head import reference as head_reference
from kernels.mla import reference as mla_reference
from kernels.moe_ffn import ExpertWeights, PackedExperts
from kernels.moe_ffn import reference as moe_reference
from kernels.paged_kv import PagedKV
from kernels.rms_norm import reference as norm_reference
from kernels.rope import reference as rope_reference
from kernels.router import reference as router_reference

Tensors = tuple[torch.Tensor, ...]
BLOCK_TOKENS = 64
CACHE_BYTES = 200 << 20  # data of all variants together, so that no cache holds them
MAX_VARIANTS = 8


@dataclass(frozen=True)
class Problem:
    """`variants[i]()` gives tensors that must be near `expected(i)`; `bytes` and `flops` are of one call."""

    variants: list[Callable[[], Tensors]]
    expected: Callable[[int], Tensors]
    bytes: float
    flops: float
    peers: dict[str, list[Callable[[], object]]] = field(default_factory=dict)  # a call a variant, or one for all


def _variants(bytes_per_call: float) -> int:
    return int(max(1, min(MAX_VARIANTS, CACHE_BYTES // max(bytes_per_call, 1))))


def norm(rows: int, width: int, device: torch.device, dtype: torch.dtype) -> Problem:
    size = torch.tensor([], dtype=dtype).element_size()
    cost = 4 * rows * width * size
    count = _variants(cost)
    x, residual = torch.randn(2, count, rows, width, device=device).to(dtype)
    weight = torch.randn(width, device=device).to(dtype)
    return Problem(
        [functools.partial(rms_norm.add_rms_norm, x[i], residual[i], weight, 1e-6) for i in range(count)],
        lambda i: norm_reference.add_rms_norm(x[i], residual[i], weight, 1e-6),
        cost,
        6 * rows * width,
        {"torch": [lambda i=i: F.rms_norm(x[i] + residual[i], (width,), weight, 1e-6) for i in range(count)]},
    )


def rope_gqa(tokens: int, heads: int, kv_heads: int, dim: int, device: torch.device, dtype: torch.dtype) -> Problem:
    fused = torch.randn(tokens, heads + 2 * kv_heads, dim, device=device).to(dtype)
    q, k, v = fused.split([heads, kv_heads, kv_heads], dim=1)
    angle = torch.rand(tokens, dim // 2, device=device) * 6
    cos, sin = angle.cos(), angle.sin()
    positions = torch.randperm(tokens, device=device)
    slots = torch.randperm(2 * tokens, device=device)[:tokens]
    caches = torch.zeros(2, 2 * tokens, 2, kv_heads, dim, device=device, dtype=dtype)

    def run(form, cache: torch.Tensor) -> Tensors:
        return form.rope_write_gqa(q, k, v, cos, sin, positions, cache, slots), cache

    moved = 2 * fused.numel() * fused.element_size()
    operations = 6 * fused.numel()
    return Problem([lambda: run(rope, caches[0])], lambda _: run(rope_reference, caches[1]), moved, operations)


def rope_mla(tokens: int, heads: int, rank: int, dim: int, device: torch.device, dtype: torch.dtype) -> Problem:
    query = torch.randn(tokens, heads, 2 * dim, device=device).to(dtype)[..., dim:]
    latent = torch.randn(tokens, rank, device=device).to(dtype)
    key = torch.randn(tokens, dim, device=device).to(dtype)
    angle = torch.rand(tokens, dim // 2, device=device) * 6
    cos, sin = angle.cos(), angle.sin()
    positions = torch.randperm(tokens, device=device)
    slots = torch.randperm(2 * tokens, device=device)[:tokens]
    caches = torch.zeros(2, 2 * tokens, rank + dim, device=device, dtype=dtype)

    def run(form, cache: torch.Tensor) -> Tensors:
        return form.rope_write_mla(query, latent, key, cos, sin, positions, cache, slots, True), cache

    moved = 2 * (query.numel() + latent.numel() + key.numel()) * query.element_size()
    operations = 6 * (query.numel() + key.numel())
    return Problem([lambda: run(rope, caches[0])], lambda _: run(rope_reference, caches[1]), moved, operations)


def _paged(lengths: list[int], entry: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> PagedKV:
    blocks = [-(-length // BLOCK_TOKENS) for length in lengths]
    order = torch.randperm(sum(blocks)).int().split(blocks)
    table = torch.nn.utils.rnn.pad_sequence(list(order), batch_first=True)
    # `randn` of the whole would need twice the memory; a tile of it, repeated, is as good as noise here.
    cache = torch.empty(sum(blocks) * BLOCK_TOKENS, *entry, device=device, dtype=dtype)
    tile = torch.randn(min(4099, len(cache)), *entry, device=device).to(dtype)
    for start in range(0, len(cache), len(tile)):
        part = cache[start : start + len(tile)]
        part.copy_(tile[: len(part)])
    lens = torch.tensor(lengths, dtype=torch.int32, device=device)
    if device.type == "cuda":
        return PagedKV(cache, BLOCK_TOKENS, table.to(device), lens)
    starts = [BLOCK_TOKENS * sum(blocks[:index]) for index in range(len(blocks))]
    return PagedKV(cache, BLOCK_TOKENS, None, lens, tuple(starts), tuple(lengths))


def _sdpa_peer(
    q: torch.Tensor, kv_heads: int, length: int, rows: int, device: torch.device, dtype: torch.dtype
) -> Callable[[], object]:
    """Torch's fused attention with the KV where it likes it: [B, heads, tokens, dim], no pages."""
    batch, heads, dim = q.shape[0] // rows, q.shape[1], q.shape[2]
    query = q.view(batch, rows, heads, dim).transpose(1, 2).contiguous()
    keys, values = torch.randn(2, batch, kv_heads, length, dim, device=device, dtype=dtype)
    causal = rows == length and rows > 1
    return lambda: F.scaled_dot_product_attention(query, keys, values, is_causal=causal, enable_gqa=heads != kv_heads)


def decode_gqa(
    lengths: list[int], heads: int, kv_heads: int, dim: int, device: torch.device, dtype: torch.dtype
) -> Problem:
    size = torch.tensor([], dtype=dtype).element_size()
    tokens = sum(lengths)
    moved = size * (2 * tokens * kv_heads * dim + 2 * len(lengths) * heads * dim)
    count = _variants(moved)
    caches = [_paged(lengths, (2, kv_heads, dim), device, dtype) for _ in range(count)]
    q = torch.randn(len(lengths), heads, dim, device=device).to(dtype)
    peers = {}
    if len(set(lengths)) == 1:
        peers["SDPA"] = [_sdpa_peer(q, kv_heads, lengths[0], 1, device, dtype) for _ in caches]
    return Problem(
        [lambda kv=kv: (attention.decode_gqa(q, kv, dim**-0.5),) for kv in caches],
        lambda i: (attention_reference.decode_gqa(q, caches[i], dim**-0.5),),
        moved,
        4 * tokens * heads * dim,
        peers,
    )


def prefill_gqa(
    length: int, rows: int, heads: int, kv_heads: int, dim: int, device: torch.device, dtype: torch.dtype
) -> Problem:
    q = torch.randn(rows, heads, dim, device=device).to(dtype)
    seen = rows * (2 * length - rows + 1) // 2  # (query, key) pairs under the causal mask
    moved = q.element_size() * (2 * length * kv_heads * dim + 2 * q.numel())
    caches = [_paged([length], (2, kv_heads, dim), device, dtype) for _ in range(_variants(moved))]
    peers = {"SDPA": [_sdpa_peer(q, kv_heads, length, rows, device, dtype)]} if rows == length else {}
    return Problem(
        [lambda kv=kv: (attention.prefill_gqa(q, kv, (rows,), dim**-0.5),) for kv in caches],
        lambda i: (attention_reference.prefill_gqa(q, caches[i], (rows,), dim**-0.5),),
        moved,
        4 * seen * heads * dim,
        peers,
    )


def decode_mla(
    lengths: list[int], heads: int, rank: int, rope_dim: int, device: torch.device, dtype: torch.dtype
) -> Problem:
    size = torch.tensor([], dtype=dtype).element_size()
    tokens = sum(lengths)
    moved = size * (tokens * (rank + rope_dim) + len(lengths) * heads * (2 * rank + rope_dim))
    count = _variants(moved)
    caches = [_paged(lengths, (rank + rope_dim,), device, dtype) for _ in range(count)]
    q_latent = torch.randn(len(lengths), heads, rank, device=device).to(dtype)
    q_rope = torch.randn(len(lengths), heads, rope_dim, device=device).to(dtype)
    scale = (rank + rope_dim) ** -0.5
    return Problem(
        [lambda kv=kv: (mla.decode_mla(q_latent, q_rope, kv, scale),) for kv in caches],
        lambda i: (mla_reference.decode_mla(q_latent, q_rope, caches[i], scale),),
        moved,
        2 * tokens * heads * (2 * rank + rope_dim),
    )


def prefill_mla(
    length: int, rows: int, heads: int, rank: int, rope_dim: int, device: torch.device, dtype: torch.dtype
) -> Problem:
    q_latent = torch.randn(rows, heads, rank, device=device).to(dtype)
    q_rope = torch.randn(rows, heads, rope_dim, device=device).to(dtype)
    scale = (rank + rope_dim) ** -0.5
    seen = rows * (2 * length - rows + 1) // 2
    moved = q_latent.element_size() * (length * (rank + rope_dim) + rows * heads * (2 * rank + rope_dim))
    caches = [_paged([length], (rank + rope_dim,), device, dtype) for _ in range(_variants(moved))]
    return Problem(
        [lambda kv=kv: (mla.prefill_mla(q_latent, q_rope, kv, (rows,), scale),) for kv in caches],
        lambda i: (mla_reference.prefill_mla(q_latent, q_rope, caches[i], (rows,), scale),),
        moved,
        2 * seen * heads * (2 * rank + rope_dim),
    )


def routing(
    rows: int, num_experts: int, top_k: int, rule: str, groups: tuple[int, int], device: torch.device, _: torch.dtype
) -> Problem:
    # Shuffled steps: no two experts of a row are so close that rounding could swap them.
    logits = torch.rand(rows, num_experts, device=device).argsort(-1).float() * (6.0 / num_experts)
    bias = torch.randn(num_experts, device=device) if rule == "sigmoid_bias" else None

    def run(form) -> Tensors:
        weights, experts = form.route(logits, top_k, rule, bias, 1.0, *groups)
        order, offsets = form.sort_by_expert(experts, num_experts)
        return weights, experts, order, offsets

    moved = 4 * rows * num_experts + rows * top_k * (4 + 8 + 8) + 8 * num_experts
    return Problem([lambda: run(router)], lambda _: run(router_reference), moved, rows * num_experts * (top_k + 4))


@functools.lru_cache(maxsize=2)
def expert_weights(num_experts: int, depth: int, width: int, device: torch.device, dtype: torch.dtype) -> ExpertWeights:
    """A layer's experts, kept for the next problem of the same layer."""

    def fill(*shape: int) -> torch.Tensor:
        weights = torch.empty(shape, device=device, dtype=dtype)
        for expert in weights:
            expert.copy_(torch.randn(expert.shape, device=device) * shape[-1] ** -0.5)
        return weights

    return ExpertWeights(fill(num_experts, 2 * width, depth), fill(num_experts, depth, width))


def _as_held(weights: ExpertWeights, device: torch.device) -> ExpertWeights | PackedExperts:
    """`weights` as a loaded model holds them on `device`: packed on the CPU."""
    return weights if device.type == "cuda" else PackedExperts.pack(weights)


def _grouped_mm_peer(
    x: torch.Tensor, weights: ExpertWeights, topk_weights: torch.Tensor, topk_experts: torch.Tensor
) -> Callable[[], object]:
    gate_up, down = weights.gate_up.transpose(1, 2), weights.down.transpose(1, 2)
    grouped_mm = getattr(F, "grouped_mm", None) or torch._grouped_mm

    def run() -> torch.Tensor:
        order = topk_experts.flatten().argsort(stable=True)
        counts = torch.zeros(gate_up.shape[0], dtype=torch.int32, device=x.device)
        counts.index_add_(0, topk_experts.flatten(), torch.ones_like(order, dtype=torch.int32))
        ends = counts.cumsum(0, dtype=torch.int32)
        token = order // topk_experts.shape[1]
        gate, up = grouped_mm(x[token], gate_up, offs=ends).chunk(2, dim=-1)
        rows = grouped_mm(F.silu(gate) * up, down, offs=ends)
        rows = rows * topk_weights.flatten()[order].unsqueeze(1).to(x.dtype)
        return torch.zeros_like(x).index_add_(0, token, rows)

    return run


def moe(
    rows: int, depth: int, width: int, num_experts: int, top_k: int, device: torch.device, dtype: torch.dtype
) -> Problem:
    weights = expert_weights(num_experts, depth, width, device, dtype)
    x = torch.randn(rows, depth, device=device).to(dtype)
    logits = torch.randn(MAX_VARIANTS, rows, num_experts, device=device)
    choices = [router_reference.route(row, top_k, "softmax_renorm", None, 1.0, 1, 1) for row in logits]
    distinct = sum(len(experts.unique()) for _, experts in choices) / len(choices)
    moved = x.element_size() * (distinct * 3 * depth * width + 2 * x.numel())
    choices = choices[: _variants(moved)]
    held = _as_held(weights, device)
    return Problem(
        [lambda routed=routed: (moe_ffn.moe_ffn(x, held, *routed),) for routed in choices],
        lambda i: (moe_reference.moe_ffn(x, weights, *choices[i]),),
        moved,
        6 * rows * top_k * depth * width,
        {"grouped_mm": [_grouped_mm_peer(x, weights, *routed) for routed in choices]},
    )


def dense(rows: int, depth: int, width: int, device: torch.device, dtype: torch.dtype) -> Problem:
    moved = torch.tensor([], dtype=dtype).element_size() * (3 * depth * width + 2 * rows * depth)
    count = _variants(moved)
    layers = expert_weights(count, depth, width, device, dtype)
    held = _as_held(layers, device)
    x = torch.randn(rows, depth, device=device).to(dtype)
    return Problem(
        [lambda i=i: (dense_ffn.dense_ffn(x, held.gate_up[i], held.down[i]),) for i in range(count)],
        lambda i: (dense_reference.dense_ffn(x, layers.gate_up[i], layers.down[i]),),
        moved,
        6 * rows * depth * width,
        {"linear": [lambda i=i: dense_reference.swiglu(x, layers.gate_up[i], layers.down[i]) for i in range(count)]},
    )


def greedy(rows: int, vocabulary: int, device: torch.device, _: torch.dtype) -> Problem:
    logits = torch.randn(rows, vocabulary, device=device)
    return Problem(
        [lambda: (lm_head.greedy(logits),)],
        lambda _: (head_reference.greedy(logits),),
        4 * logits.numel(),
        logits.numel(),
        {"argmax": [lambda: logits.argmax(-1)]},
    )
