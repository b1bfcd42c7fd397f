"""The small models that `make` writes: five architectures in a size for tests and two for benchmarks.

Each is its published model in miniature: the same attention, routing and layer pattern, fewer and narrower layers. The
110M Mixtral is the yardstick of the CPU benchmarks.
"""

from __future__ import annotations

from typing import Any

from serving.errors import UserError

SIZES = ("tiny", "100m", "600m")

_COMMON = {"hidden_act": "silu", "initializer_range": 0.02, "bos_token_id": 1, "eos_token_id": 2, "use_cache": True}
_YARN = {
    "type": "yarn", "factor": 40, "beta_fast": 32, "beta_slow": 1, "mscale": 0.707, "mscale_all_dim": 0.707,
}  # fmt: skip

# columns of each architecture: hidden, layers, heads, vocabulary, context; then what is its own
_SHAPES: dict[tuple[str, str], dict[str, Any]] = {
    ("mixtral", "tiny"): {
        "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
        "vocab_size": 384, "max_position_embeddings": 512, "intermediate_size": 96, "num_local_experts": 8,
    },
    ("mixtral", "100m"): {
        "hidden_size": 512, "num_hidden_layers": 8, "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 64,
        "vocab_size": 4096, "max_position_embeddings": 8192, "intermediate_size": 1024, "num_local_experts": 8,
    },
    ("mixtral", "600m"): {
        "hidden_size": 1024, "num_hidden_layers": 11, "num_attention_heads": 16, "num_key_value_heads": 4, "head_dim": 64,
        "vocab_size": 8192, "max_position_embeddings": 8192, "intermediate_size": 2048, "num_local_experts": 8,
    },
    ("deepseek", "tiny"): {
        "hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 3, "vocab_size": 320,
        "max_position_embeddings": 512, "intermediate_size": 160, "moe_intermediate_size": 24, "n_routed_experts": 10,
        "num_experts_per_tok": 3, "n_shared_experts": 2,
    },
    ("deepseek", "100m"): {
        "hidden_size": 512, "num_hidden_layers": 8, "num_attention_heads": 8, "vocab_size": 4096,
        "max_position_embeddings": 4096, "intermediate_size": 2048, "moe_intermediate_size": 256,
        "n_routed_experts": 32, "num_experts_per_tok": 6, "n_shared_experts": 2,
    },
    ("deepseek", "600m"): {
        "hidden_size": 1024, "num_hidden_layers": 11, "num_attention_heads": 16, "vocab_size": 8192,
        "max_position_embeddings": 4096, "intermediate_size": 4096, "moe_intermediate_size": 512,
        "n_routed_experts": 32, "num_experts_per_tok": 6, "n_shared_experts": 2,
    },
    ("deepseek_v2", "tiny"): {
        "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 352,
        "max_position_embeddings": 640, "intermediate_size": 160, "moe_intermediate_size": 24, "n_routed_experts": 8,
        "num_experts_per_tok": 3, "n_shared_experts": 2, "kv_lora_rank": 28, "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 12, "v_head_dim": 20, "q_lora_rank": None, "original": 16,
    },
    ("deepseek_v2", "100m"): {
        "hidden_size": 512, "num_hidden_layers": 8, "num_attention_heads": 8, "vocab_size": 4096,
        "max_position_embeddings": 8192, "intermediate_size": 2048, "moe_intermediate_size": 256,
        "n_routed_experts": 32, "num_experts_per_tok": 6, "n_shared_experts": 2, "kv_lora_rank": 128,
        "qk_rope_head_dim": 32, "qk_nope_head_dim": 64, "v_head_dim": 64, "q_lora_rank": None, "original": 256,
    },
    ("deepseek_v2", "600m"): {
        "hidden_size": 1024, "num_hidden_layers": 11, "num_attention_heads": 16, "vocab_size": 8192,
        "max_position_embeddings": 8192, "intermediate_size": 4096, "moe_intermediate_size": 512,
        "n_routed_experts": 32, "num_experts_per_tok": 6, "n_shared_experts": 2, "kv_lora_rank": 256,
        "qk_rope_head_dim": 32, "qk_nope_head_dim": 64, "v_head_dim": 64, "q_lora_rank": None, "original": 256,
    },
    ("qwen3_moe", "tiny"): {
        "hidden_size": 56, "num_hidden_layers": 4, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 12,
        "vocab_size": 300, "max_position_embeddings": 512, "intermediate_size": 96, "moe_intermediate_size": 20,
        "num_experts": 12, "num_experts_per_tok": 4,
    },
    ("qwen3_moe", "100m"): {
        "hidden_size": 512, "num_hidden_layers": 8, "num_attention_heads": 8, "num_key_value_heads": 1, "head_dim": 64,
        "vocab_size": 4096, "max_position_embeddings": 8192, "intermediate_size": 1536, "moe_intermediate_size": 256,
        "num_experts": 32, "num_experts_per_tok": 4,
    },
    ("qwen3_moe", "600m"): {
        "hidden_size": 1024, "num_hidden_layers": 11, "num_attention_heads": 16, "num_key_value_heads": 2, "head_dim": 64,
        "vocab_size": 8192, "max_position_embeddings": 8192, "intermediate_size": 3072, "moe_intermediate_size": 512,
        "num_experts": 32, "num_experts_per_tok": 4,
    },
    ("glm4_moe_lite", "tiny"): {
        "hidden_size": 40, "num_hidden_layers": 3, "num_attention_heads": 5, "vocab_size": 288,
        "max_position_embeddings": 512, "intermediate_size": 112, "moe_intermediate_size": 24, "n_routed_experts": 8,
        "num_experts_per_tok": 2, "n_shared_experts": 1, "kv_lora_rank": 24, "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 12, "v_head_dim": 16, "q_lora_rank": 20,
    },
    ("glm4_moe_lite", "100m"): {
        "hidden_size": 512, "num_hidden_layers": 8, "num_attention_heads": 10, "vocab_size": 4096,
        "max_position_embeddings": 8192, "intermediate_size": 2048, "moe_intermediate_size": 256,
        "n_routed_experts": 32, "num_experts_per_tok": 4, "n_shared_experts": 1, "kv_lora_rank": 128,
        "qk_rope_head_dim": 32, "qk_nope_head_dim": 64, "v_head_dim": 64, "q_lora_rank": 192,
    },
    ("glm4_moe_lite", "600m"): {
        "hidden_size": 1024, "num_hidden_layers": 11, "num_attention_heads": 20, "vocab_size": 8192,
        "max_position_embeddings": 8192, "intermediate_size": 4096, "moe_intermediate_size": 512,
        "n_routed_experts": 32, "num_experts_per_tok": 4, "n_shared_experts": 1, "kv_lora_rank": 256,
        "qk_rope_head_dim": 32, "qk_nope_head_dim": 64, "v_head_dim": 64, "q_lora_rank": 384,
    },
}  # fmt: skip

_OWN: dict[str, dict[str, Any]] = {
    "mixtral": {
        "architectures": ["MixtralForCausalLM"], "num_experts_per_tok": 2, "rms_norm_eps": 1e-5, "rope_theta": 1e6,
        "sliding_window": None, "tie_word_embeddings": False,
    },
    "deepseek": {
        "architectures": ["DeepseekForCausalLM"], "first_k_dense_replace": 1, "moe_layer_freq": 1,
        "norm_topk_prob": False, "scoring_func": "softmax", "rms_norm_eps": 1e-6, "rope_theta": 10000,
        "rope_scaling": None, "tie_word_embeddings": False,
    },
    "deepseek_v2": {
        "architectures": ["DeepseekV2ForCausalLM"], "first_k_dense_replace": 1, "moe_layer_freq": 1, "n_group": 1,
        "topk_group": 1, "topk_method": "greedy", "norm_topk_prob": False, "scoring_func": "softmax",
        "routed_scaling_factor": 1.0, "rms_norm_eps": 1e-6, "rope_theta": 10000, "tie_word_embeddings": False,
    },
    "qwen3_moe": {
        "architectures": ["Qwen3MoeForCausalLM"], "norm_topk_prob": True, "decoder_sparse_step": 1,
        "mlp_only_layers": [], "rms_norm_eps": 1e-6, "rope_theta": 1e6, "tie_word_embeddings": False,
    },
    "glm4_moe_lite": {
        "architectures": ["Glm4MoeLiteForCausalLM"], "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1,
        "topk_method": "noaux_tc", "norm_topk_prob": True, "routed_scaling_factor": 1.8, "rms_norm_eps": 1e-5,
        "rope_theta": 1e6, "tie_word_embeddings": False,
    },
}  # fmt: skip


def config_of(architecture: str, size: str, dtype: str) -> dict[str, Any]:
    """The `config.json` of a made checkpoint. Raises UserError for an unknown architecture or size."""
    if architecture not in _OWN:
        raise UserError(f"unknown architecture {architecture!r}; known: {', '.join(_OWN)}")
    if size not in SIZES:
        raise UserError(f"unknown size {size!r}; known: {', '.join(SIZES)}")
    shape = dict(_SHAPES[architecture, size])
    original = shape.pop("original", None)
    config = {"model_type": architecture, "torch_dtype": dtype, **_COMMON, **_OWN[architecture], **shape}
    config.setdefault("num_key_value_heads", config["num_attention_heads"])
    if original is not None:
        config["rope_scaling"] = {**_YARN, "original_max_position_embeddings": original}
    return config
