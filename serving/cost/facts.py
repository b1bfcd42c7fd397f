"""What follows from a model's config alone: weight bytes by part, KV bytes, and the FLOPs and bytes of every stage.

A stage is what one device does between two hand-offs or launches: attention projections, the attention core, the router,
the routed experts, the shared expert, a dense FFN, the embedding, the LM head. Everything is per layer and per device
under tensor parallelism `tp`; FLOPs count a multiply-add as two. Bytes are what *must* move: each weight once, each
distinct expert once, the KV once, activations in and out.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from serving.errors import UserError
from serving.spec import GQASpec, MLASpec, ModelSpec, element_bytes


@dataclass(frozen=True)
class Work:
    """FLOPs and bytes of a stage. Weight and KV bytes are kept apart: batching amortises the first, never the second."""

    flops: float = 0.0
    weight_bytes: float = 0.0
    kv_bytes: float = 0.0
    activation_bytes: float = 0.0

    @property
    def bytes(self) -> float:
        return self.weight_bytes + self.kv_bytes + self.activation_bytes

    @property
    def intensity(self) -> float:
        """FLOPs a byte."""
        return self.flops / self.bytes if self.bytes else 0.0

    def __add__(self, other: Work) -> Work:
        return Work(
            self.flops + other.flops,
            self.weight_bytes + other.weight_bytes,
            self.kv_bytes + other.kv_bytes,
            self.activation_bytes + other.activation_bytes,
        )

    def times(self, count: float) -> Work:
        return Work(self.flops * count, self.weight_bytes * count, self.kv_bytes * count, self.activation_bytes * count)


def total(works: Iterable[Work]) -> Work:
    """The sum of stages."""
    result = Work()
    for work in works:
        result = result + work
    return result


# -- weights and KV ----------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class WeightBytes:
    """Weights of a whole model in bytes, by part (norm vectors, a few KiB a layer, are counted with attention)."""

    attention: int
    router: int
    experts: int
    shared_experts: int
    dense_ffn: int
    embedding: int
    head: int  # 0 when it is tied to the embedding

    @property
    def ffn(self) -> int:
        """What CrossPool puts into the weights pool: routers, experts, shared experts, dense FFNs."""
        return self.router + self.experts + self.shared_experts + self.dense_ffn

    @property
    def kv_side(self) -> int:
        """What CrossPool keeps next to the KV: attention, norms, embedding, LM head."""
        return self.attention + self.embedding + self.head

    @property
    def total(self) -> int:
        return self.ffn + self.kv_side

    @property
    def ffn_share(self) -> float:
        return self.ffn / self.total


def norm_elements(spec: ModelSpec) -> int:
    """Norm vectors of the model: two a layer and the last one, with what q/k norms and latent norms add."""
    attention = spec.attention
    if isinstance(attention, MLASpec):
        per_layer = attention.kv_rank + (attention.q_rank or 0)
    else:
        per_layer = 2 * attention.head_dim if attention.qk_norm else 0
    return spec.num_layers * (2 * spec.hidden_size + per_layer) + spec.hidden_size


def weight_bytes(spec: ModelSpec, dtype: str = "bfloat16") -> WeightBytes:
    """Weights of `spec` by part, stored in `dtype`."""
    size = element_bytes(dtype)
    dense_layers = len(spec.dense_layers)
    moe_layers = spec.num_layers - dense_layers
    vocabulary = spec.vocab_size * spec.hidden_size
    return WeightBytes(
        attention=size * (spec.attention_elements + norm_elements(spec)),
        router=size * moe_layers * spec.moe.num_experts * spec.hidden_size,
        experts=size * moe_layers * spec.moe.num_experts * spec.expert_elements,
        shared_experts=size * moe_layers * 3 * spec.hidden_size * spec.moe.shared_width,
        dense_ffn=size * dense_layers * 3 * spec.hidden_size * spec.dense_width,
        embedding=size * vocabulary,
        head=0 if spec.tied_head else size * vocabulary,
    )


def crossing_bytes(spec: ModelSpec, tokens: int, dtype: str = "bfloat16") -> int:
    """Bytes of one boundary crossing: the hidden rows of `tokens` tokens."""
    return tokens * spec.hidden_size * element_bytes(dtype)


def crossings_per_token(spec: ModelSpec) -> int:
    """Boundary crossings of one decoded token: there and back in every layer."""
    return 2 * spec.num_layers


# -- parallel plans ----------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class AttentionPlan:
    """How a model's attention is spread over `tp * dp` devices. KV of one request lies on one of the `dp` replicas."""

    tp: int
    dp: int

    @property
    def devices(self) -> int:
        return self.tp * self.dp

    @property
    def kv_share_of_one_request(self) -> float:
        """Share of the KV capacity of all devices that one request can use (the paper's Fig. 2)."""
        return 1.0 / self.dp


def shardable_kv_heads(spec: ModelSpec) -> int:
    """Into how many parts a token's KV can be cut without copies: its KV heads; 1 for MLA's shared latent."""
    return spec.attention.num_kv_heads if isinstance(spec.attention, GQASpec) else 1


def attention_plan(kv_heads: int, devices: int) -> AttentionPlan:
    """The widest tensor parallelism that copies no KV, the rest data parallel (the paper, Fig. 2)."""
    tp = math.gcd(kv_heads, devices)
    return AttentionPlan(tp=tp, dp=devices // tp)


# -- stages ------------------------------------------------------------------------------------------------------------
def _matmul(rows: float, inputs: int, outputs: int, size: int, copies: float = 1.0) -> Work:
    """`rows` rows through `copies` matrices [inputs, outputs], each of them read once."""
    return Work(
        flops=2.0 * rows * inputs * outputs,
        weight_bytes=copies * inputs * outputs * size,
        activation_bytes=rows * (inputs + outputs) * size,
    )


def projection_shapes(spec: ModelSpec, tp: int = 1, absorbed: bool = True) -> tuple[tuple[int, int], ...]:
    """(inputs, outputs) of the projections of one attention layer on one of `tp` devices, as they are launched.

    GQA: fused QKV, output. MLA: query (through its latent where there is one), KV latent, absorption of W_UK into the
    query, W_UV on the way out, output. With `absorbed` off (prefill), W_UK and W_UV expand the latent instead.
    """
    attention, hidden = spec.attention, spec.hidden_size
    _check_tp(spec, tp)
    heads = attention.num_heads // tp
    if isinstance(attention, GQASpec):
        kv_heads = max(1, attention.num_kv_heads // tp)
        query = heads * attention.head_dim
        return ((hidden, query + 2 * kv_heads * attention.head_dim), (query, hidden))
    query = heads * attention.qk_dim
    latent = attention.kv_rank + attention.rope_dim
    if attention.q_rank is None:
        first = ((hidden, query + latent),)
    else:
        first = ((hidden, attention.q_rank + latent), (attention.q_rank, query))
    expand = heads * (attention.nope_dim + attention.value_dim)
    middle = ((heads * attention.nope_dim, attention.kv_rank), (attention.kv_rank, heads * attention.value_dim))
    if not absorbed:
        middle = ((attention.kv_rank, expand),)
    return (*first, *middle, (heads * attention.value_dim, hidden))


def projection_work(spec: ModelSpec, rows: int, dtype: str = "bfloat16", tp: int = 1, absorbed: bool = True) -> Work:
    """All projections of one attention layer for `rows` tokens."""
    size = element_bytes(dtype)
    return total(_matmul(rows, i, o, size) for i, o in projection_shapes(spec, tp, absorbed))


def decode_core_work(spec: ModelSpec, batch: int, context_tokens: float, dtype: str = "bfloat16", tp: int = 1) -> Work:
    """The attention core of one layer at decode: one query a sequence over `context_tokens` tokens, all sequences' sum."""
    _check_tp(spec, tp)
    size, attention = element_bytes(dtype), spec.attention
    heads = attention.num_heads // tp
    if isinstance(attention, GQASpec):
        per_token = 2 * max(1, attention.num_kv_heads // tp) * attention.head_dim
        width_in = width_out = attention.head_dim
    else:  # absorbed: scores over rank + rope, values over rank; the latent is copied to every tensor-parallel rank
        per_token = attention.kv_elements_per_token
        width_in, width_out = attention.kv_elements_per_token, attention.kv_rank
    return Work(
        flops=2.0 * context_tokens * heads * (width_in + width_out),
        kv_bytes=context_tokens * per_token * size,
        activation_bytes=batch * heads * (width_in + width_out) * size,
    )


def prefill_core_work(
    spec: ModelSpec, new_tokens: int, past_tokens: int = 0, dtype: str = "bfloat16", tp: int = 1
) -> Work:
    """The attention core of one layer for a causal chunk of `new_tokens` after `past_tokens` of one sequence."""
    _check_tp(spec, tp)
    size, attention = element_bytes(dtype), spec.attention
    heads = attention.num_heads // tp
    if isinstance(attention, GQASpec):
        per_token = 2 * max(1, attention.num_kv_heads // tp) * attention.head_dim
        width_in = width_out = attention.head_dim
    else:  # expanded: each head has its own keys and values
        per_token = attention.kv_elements_per_token
        width_in, width_out = attention.qk_dim, attention.value_dim
    pairs = new_tokens * past_tokens + new_tokens * (new_tokens + 1) / 2
    return Work(
        flops=2.0 * pairs * heads * (width_in + width_out),
        kv_bytes=(past_tokens + new_tokens) * per_token * size,
        activation_bytes=new_tokens * heads * (width_in + width_out) * size,
    )


def router_work(spec: ModelSpec, tokens: int, dtype: str = "bfloat16") -> Work:
    """The router of one MoE layer: every token against every expert."""
    return _matmul(tokens, spec.hidden_size, spec.moe.num_experts, element_bytes(dtype))


def moe_work(spec: ModelSpec, tokens: int, dtype: str = "bfloat16", tp: int = 1, distinct: float | None = None) -> Work:
    """The routed experts of one layer. `distinct` experts are read; by default the expected number (uniform routing)."""
    moe, size = spec.moe, element_bytes(dtype)
    hit = moe.distinct_experts(tokens) if distinct is None else distinct
    width = moe.expert_width / tp
    pairs = tokens * moe.top_k
    return Work(
        flops=6.0 * pairs * spec.hidden_size * width,
        weight_bytes=hit * 3 * spec.hidden_size * width * size,
        activation_bytes=(2 * tokens * spec.hidden_size + pairs * 3 * width) * size,
    )


def gated_ffn_work(hidden: int, width: float, tokens: int, dtype: str = "bfloat16") -> Work:
    """A gated FFN of `width`: a dense layer's, or the shared experts joined."""
    size = element_bytes(dtype)
    return Work(
        flops=6.0 * tokens * hidden * width,
        weight_bytes=3 * hidden * width * size,
        activation_bytes=(2 * tokens * hidden + tokens * 3 * width) * size,
    )


def ffn_work(
    spec: ModelSpec, layer: int, tokens: int, dtype: str = "bfloat16", tp: int = 1, distinct: float | None = None
) -> Work:
    """The whole FFN of `layer`: dense, or router, routed and shared experts."""
    if spec.is_dense(layer):
        return gated_ffn_work(spec.hidden_size, spec.dense_width / tp, tokens, dtype)
    parts = [router_work(spec, tokens, dtype), moe_work(spec, tokens, dtype, tp, distinct)]
    if spec.moe.shared_width:
        parts.append(gated_ffn_work(spec.hidden_size, spec.moe.shared_width / tp, tokens, dtype))
    return total(parts)


def embedding_work(spec: ModelSpec, tokens: int, dtype: str = "bfloat16") -> Work:
    """A row of the table a token."""
    return Work(activation_bytes=2.0 * tokens * spec.hidden_size * element_bytes(dtype))


def head_work(spec: ModelSpec, rows: int, dtype: str = "bfloat16", tp: int = 1) -> Work:
    """The LM head for the `rows` positions that are sampled."""
    return _matmul(rows, spec.hidden_size, math.ceil(spec.vocab_size / tp), element_bytes(dtype))


def norm_work(rows: int, hidden: int, dtype: str = "bfloat16") -> Work:
    """One RMS norm fused with the residual add: two rows in, two out."""
    return Work(flops=6.0 * rows * hidden, activation_bytes=4.0 * rows * hidden * element_bytes(dtype))


def sampling_work(spec: ModelSpec, rows: int, dtype: str = "bfloat16") -> Work:
    """Greedy sampling: the logits once."""
    return Work(flops=float(rows * spec.vocab_size), activation_bytes=rows * spec.vocab_size * element_bytes(dtype))


def _check_tp(spec: ModelSpec, tp: int) -> None:
    if tp < 1 or spec.attention.num_heads % tp:
        raise UserError(f"{spec.name}: {spec.attention.num_heads} attention heads cannot be cut into {tp} parts")
