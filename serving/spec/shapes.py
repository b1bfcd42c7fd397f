"""A model's shape in one frozen vocabulary. Sizes in elements or bytes are derived from the fields, never stored beside."""

from __future__ import annotations

import math
from dataclasses import dataclass

from serving.errors import UserError

BYTES_PER_ELEMENT = {"float32": 4, "bfloat16": 2, "float16": 2}


def element_bytes(dtype: str) -> int:
    """Bytes of one element of `dtype`; raises :class:`UserError` for a dtype that no kernel here computes in."""
    try:
        return BYTES_PER_ELEMENT[dtype]
    except KeyError:
        raise UserError(f"unknown dtype {dtype!r}; known: {', '.join(BYTES_PER_ELEMENT)}") from None


@dataclass(frozen=True)
class RopeSpec:
    """Rotary embedding of `dim` channels. `factor` and the fields below it matter for `yarn` (and `linear`) only."""

    theta: float
    dim: int
    scaling: str = "default"  # default | linear | yarn
    interleaved: bool = False  # rotate (x0, x1), (x2, x3)... rather than (x0, x[dim/2])...
    factor: float = 1.0
    original_context_tokens: int = 0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 0.0
    mscale_all_dim: float = 0.0


@dataclass(frozen=True)
class GQASpec:
    """Multi-head attention with `num_kv_heads` key/value heads (equal to `num_heads` for plain MHA)."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    qk_norm: bool = False

    def __post_init__(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise UserError(f"{self.num_heads} attention heads cannot share {self.num_kv_heads} KV heads evenly")

    @property
    def kind(self) -> str:
        return "mha" if self.num_heads == self.num_kv_heads else "gqa"

    @property
    def kv_elements_per_token(self) -> int:
        """Elements one token leaves in one layer's KV cache: K and V of every KV head."""
        return 2 * self.num_kv_heads * self.head_dim

    @property
    def softmax_scale(self) -> float:
        return self.head_dim**-0.5

    def weight_elements(self, hidden: int) -> int:
        """Projection weights of one layer (norm vectors excluded)."""
        return hidden * self.head_dim * (2 * self.num_heads + 2 * self.num_kv_heads)


@dataclass(frozen=True)
class MLASpec:
    """Multi-head latent attention (DeepSeek-V2, section 2.1): one latent of `kv_rank + rope_dim` a token, all heads."""

    num_heads: int
    kv_rank: int
    rope_dim: int
    nope_dim: int
    value_dim: int
    q_rank: int | None = None

    kind = "mla"

    @property
    def kv_elements_per_token(self) -> int:
        return self.kv_rank + self.rope_dim

    @property
    def qk_dim(self) -> int:
        return self.nope_dim + self.rope_dim

    @property
    def softmax_scale(self) -> float:
        """Before YaRN's correction, which :func:`yarn_softmax_factor` gives."""
        return self.qk_dim**-0.5

    def weight_elements(self, hidden: int) -> int:
        """Projection weights of one layer (norm vectors excluded)."""
        query = self.num_heads * self.qk_dim
        query_elements = hidden * query if self.q_rank is None else self.q_rank * (hidden + query)
        latent_elements = hidden * (self.kv_rank + self.rope_dim)
        expand_elements = self.kv_rank * self.num_heads * (self.nope_dim + self.value_dim)
        return query_elements + latent_elements + expand_elements + self.num_heads * self.value_dim * hidden


ROUTING_RULES = ("softmax_topk_renorm", "softmax", "softmax_renorm", "sigmoid_bias")


@dataclass(frozen=True)
class MoESpec:
    """A routed FFN. `routing` is one of :data:`ROUTING_RULES`:

    - `softmax_topk_renorm` Mixtral: softmax over all experts, the top k renormalised (equals softmax of the top k logits);
    - `softmax` DeepSeek-MoE and -V2: softmax over all experts, the top k taken as they are;
    - `softmax_renorm` Qwen3-MoE: as Mixtral's arithmetic, with `norm_topk_prob` set in the config;
    - `sigmoid_bias` GLM-4.7-Flash: sigmoid scores, chosen with a correction bias added, weighted without it, renormalised.

    Weights are multiplied by `routed_scale` last. `num_groups > 1` restricts the choice to the best `top_groups` groups.
    """

    num_experts: int
    top_k: int
    expert_width: int
    routing: str
    shared_width: int = 0  # width of all shared experts joined; 0 for none
    routed_scale: float = 1.0
    num_groups: int = 1
    top_groups: int = 1

    def __post_init__(self) -> None:
        if self.routing not in ROUTING_RULES:
            raise UserError(f"unknown routing rule {self.routing!r}; known: {', '.join(ROUTING_RULES)}")
        if not 1 <= self.top_k <= self.num_experts:
            raise UserError(f"top-{self.top_k} of {self.num_experts} experts is not a choice")

    def distinct_experts(self, tokens: int) -> float:
        """Expected number of distinct experts that `tokens` tokens hit under uniform routing: E (1 - (1 - k/E)^T)."""
        return self.num_experts * (1.0 - (1.0 - self.top_k / self.num_experts) ** tokens)


@dataclass(frozen=True)
class ModelSpec:
    """One model: what its layers are, and what follows from that in elements and bytes."""

    name: str
    architecture: str
    num_layers: int
    hidden_size: int
    vocab_size: int
    attention: GQASpec | MLASpec
    moe: MoESpec
    rope: RopeSpec
    dense_width: int  # FFN width of the dense layers; 0 when there are none
    dense_layers: tuple[int, ...]  # indices of layers whose FFN is dense
    norm_eps: float
    max_context_tokens: int
    tied_head: bool
    dtype: str  # as stored in the checkpoint
    eos_token_ids: tuple[int, ...]

    def is_dense(self, layer: int) -> bool:
        return layer in self.dense_layers

    # -- sizes ---------------------------------------------------------------------------------------------------------
    @property
    def attention_elements(self) -> int:
        """Projection weights of all layers' attention: the column "attention B" of the paper's Table 1."""
        return self.num_layers * self.attention.weight_elements(self.hidden_size)

    @property
    def expert_elements(self) -> int:
        """One routed expert: gate, up and down."""
        return 3 * self.hidden_size * self.moe.expert_width

    def ffn_layer_elements(self, layer: int) -> int:
        """FFN weights of one layer, router included."""
        if self.is_dense(layer):
            return 3 * self.hidden_size * self.dense_width
        shared = 3 * self.hidden_size * self.moe.shared_width
        return self.moe.num_experts * (self.expert_elements + self.hidden_size) + shared

    @property
    def ffn_elements(self) -> int:
        """FFN weights of all layers, routers included: the column "FFN B" of the paper's Table 1."""
        return sum(self.ffn_layer_elements(layer) for layer in range(self.num_layers))

    @property
    def embedding_elements(self) -> int:
        """Embedding and, where it is not tied, the LM head."""
        return self.vocab_size * self.hidden_size * (1 if self.tied_head else 2)

    @property
    def total_elements(self) -> int:
        """All weights but the norm vectors."""
        return self.attention_elements + self.ffn_elements + self.embedding_elements

    def kv_bytes_per_token_layer(self, dtype: str) -> int:
        return self.attention.kv_elements_per_token * element_bytes(dtype)

    def kv_bytes_per_token(self, dtype: str) -> int:
        """KV cache that one token leaves in all layers, in bytes."""
        return self.num_layers * self.kv_bytes_per_token_layer(dtype)


def yarn_mscale(factor: float, mscale: float) -> float:
    """YaRN's attention temperature, sqrt(1/t) = 0.1 m ln(s) + 1 (arXiv 2309.00071, eq. 22, with DeepSeek's `mscale`)."""
    return 1.0 if factor <= 1.0 else 0.1 * mscale * math.log(factor) + 1.0


def yarn_softmax_factor(rope: RopeSpec) -> float:
    """What multiplies the softmax scale of an MLA model under YaRN: mscale(factor, mscale_all_dim) squared."""
    if rope.scaling != "yarn" or not rope.mscale_all_dim:
        return 1.0
    return yarn_mscale(rope.factor, rope.mscale_all_dim) ** 2
