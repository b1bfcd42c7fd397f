"""How published checkpoints name a model's tensors, and what shape each has. Facts of the five architectures, one place.

A *role* is what layers call a tensor (`q`, `gate`, `down`); its name is what the safetensors file calls it.
"""

from __future__ import annotations

from serving.spec import MLASpec, ModelSpec

Shape = tuple[int, ...]

EMBEDDING, FINAL_NORM, HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"

_ATTENTION_NAMES = {
    "input_norm": "input_layernorm.weight",
    "post_norm": "post_attention_layernorm.weight",
    "q": "self_attn.q_proj.weight",
    "k": "self_attn.k_proj.weight",
    "v": "self_attn.v_proj.weight",
    "o": "self_attn.o_proj.weight",
    "q_norm": "self_attn.q_norm.weight",
    "k_norm": "self_attn.k_norm.weight",
    "q_a": "self_attn.q_a_proj.weight",
    "q_a_norm": "self_attn.q_a_layernorm.weight",
    "q_b": "self_attn.q_b_proj.weight",
    "kv_a": "self_attn.kv_a_proj_with_mqa.weight",
    "kv_a_norm": "self_attn.kv_a_layernorm.weight",
    "kv_b": "self_attn.kv_b_proj.weight",
}


def attention_shapes(spec: ModelSpec) -> dict[str, Shape]:
    """Roles of one layer's attention tensors, with shapes."""
    attention, hidden = spec.attention, spec.hidden_size
    shapes: dict[str, Shape] = {"input_norm": (hidden,), "post_norm": (hidden,)}
    if isinstance(attention, MLASpec):
        query = attention.num_heads * attention.qk_dim
        if attention.q_rank is None:
            shapes["q"] = (query, hidden)
        else:
            shapes["q_a"], shapes["q_a_norm"] = (attention.q_rank, hidden), (attention.q_rank,)
            shapes["q_b"] = (query, attention.q_rank)
        shapes["kv_a"], shapes["kv_a_norm"] = (attention.kv_rank + attention.rope_dim, hidden), (attention.kv_rank,)
        shapes["kv_b"] = (attention.num_heads * (attention.nope_dim + attention.value_dim), attention.kv_rank)
        shapes["o"] = (hidden, attention.num_heads * attention.value_dim)
        return shapes
    query, key = attention.num_heads * attention.head_dim, attention.num_kv_heads * attention.head_dim
    shapes |= {"q": (query, hidden), "k": (key, hidden), "v": (key, hidden), "o": (hidden, query)}
    if attention.qk_norm:
        shapes |= {"q_norm": (attention.head_dim,), "k_norm": (attention.head_dim,)}
    return shapes


def router_shapes(spec: ModelSpec) -> dict[str, Shape]:
    """Roles of one layer's router tensors, with shapes."""
    shapes: dict[str, Shape] = {"gate": (spec.moe.num_experts, spec.hidden_size)}
    if spec.moe.routing == "sigmoid_bias":
        shapes["bias"] = (spec.moe.num_experts,)
    return shapes


def ffn_shapes(spec: ModelSpec, width: int) -> tuple[Shape, Shape, Shape]:
    """Shapes of gate, up and down of an FFN of `width`."""
    return (width, spec.hidden_size), (width, spec.hidden_size), (spec.hidden_size, width)


def attention_name(layer: int, role: str) -> str:
    return f"model.layers.{layer}.{_ATTENTION_NAMES[role]}"


def router_name(spec: ModelSpec, layer: int, role: str) -> str:
    block = "block_sparse_moe" if spec.architecture == "mixtral" else "mlp"
    suffix = {"gate": "gate.weight", "bias": "gate.e_score_correction_bias"}[role]
    return f"model.layers.{layer}.{block}.{suffix}"


def expert_names(spec: ModelSpec, layer: int, index: int) -> tuple[str, str, str]:
    """Names of an expert's gate, up and down."""
    if spec.architecture == "mixtral":
        prefix = f"model.layers.{layer}.block_sparse_moe.experts.{index}"
        return f"{prefix}.w1.weight", f"{prefix}.w3.weight", f"{prefix}.w2.weight"
    return _mlp_names(f"model.layers.{layer}.mlp.experts.{index}")


def shared_names(layer: int) -> tuple[str, str, str]:
    return _mlp_names(f"model.layers.{layer}.mlp.shared_experts")


def dense_names(layer: int) -> tuple[str, str, str]:
    return _mlp_names(f"model.layers.{layer}.mlp")


def _mlp_names(prefix: str) -> tuple[str, str, str]:
    return f"{prefix}.gate_proj.weight", f"{prefix}.up_proj.weight", f"{prefix}.down_proj.weight"


def all_shapes(spec: ModelSpec) -> dict[str, Shape]:
    """Every tensor that a checkpoint of this model must hold, by name. Order: as a forward pass meets them."""
    shapes: dict[str, Shape] = {EMBEDDING: (spec.vocab_size, spec.hidden_size)}
    for layer in range(spec.num_layers):
        shapes |= {attention_name(layer, role): shape for role, shape in attention_shapes(spec).items()}
        if spec.is_dense(layer):
            shapes |= zip(dense_names(layer), ffn_shapes(spec, spec.dense_width), strict=True)
            continue
        shapes |= {router_name(spec, layer, role): shape for role, shape in router_shapes(spec).items()}
        for index in range(spec.moe.num_experts):
            shapes |= zip(expert_names(spec, layer, index), ffn_shapes(spec, spec.moe.expert_width), strict=True)
        if spec.moe.shared_width:
            shapes |= zip(shared_names(layer), ffn_shapes(spec, spec.moe.shared_width), strict=True)
    shapes[FINAL_NORM] = (spec.hidden_size,)
    if not spec.tied_head:
        shapes[HEAD] = (spec.vocab_size, spec.hidden_size)
    return shapes


class NamedWeights:
    """The role-wise view of any store that can return a tensor by name; subclasses implement `tensor` and `close`."""

    def __init__(self, spec: ModelSpec) -> None:
        self.spec = spec

    def tensor(self, name: str):
        raise NotImplementedError

    def close(self) -> None:
        """Release what the store holds."""

    def attention(self, layer: int):
        return {role: self.tensor(attention_name(layer, role)) for role in attention_shapes(self.spec)}

    def router(self, layer: int):
        return {role: self.tensor(router_name(self.spec, layer, role)) for role in router_shapes(self.spec)}

    def expert(self, layer: int, index: int):
        return tuple(self.tensor(name) for name in expert_names(self.spec, layer, index))

    def shared(self, layer: int):
        return tuple(self.tensor(name) for name in shared_names(layer))

    def dense(self, layer: int):
        return tuple(self.tensor(name) for name in dense_names(layer))

    def embedding(self):
        return self.tensor(EMBEDDING)

    def final_norm(self):
        return self.tensor(FINAL_NORM)

    def head(self):
        return self.tensor(EMBEDDING if self.spec.tied_head else HEAD)

    def __enter__(self):
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
