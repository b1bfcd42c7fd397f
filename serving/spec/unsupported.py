"""What a `config.json` may ask for that no layer here computes. Serving it all the same would give wrong tokens silently."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from serving.errors import UserError

_COUNTS = (
    "num_hidden_layers", "hidden_size", "vocab_size", "intermediate_size", "max_position_embeddings",
    "num_attention_heads", "num_key_value_heads", "head_dim", "num_experts_per_tok", "moe_intermediate_size",
    "n_routed_experts", "num_experts", "num_local_experts", "kv_lora_rank", "q_lora_rank", "qk_rope_head_dim",
    "qk_nope_head_dim", "v_head_dim", "decoder_sparse_step", "moe_layer_freq",
)  # fmt: skip
_SCORING = {"deepseek": "softmax", "deepseek_v2": "softmax", "glm4_moe_lite": "sigmoid"}
_CHOICES = {"deepseek": ("greedy",), "deepseek_v2": ("greedy", "group_limited_greedy"), "glm4_moe_lite": ("noaux_tc",)}
_RENORMALISES = {"deepseek_v2": False, "glm4_moe_lite": True}  # the architectures whose layers know one way only


def refuse_unsupported(config: Mapping[str, Any], name: str) -> None:
    """Raises UserError, naming the key and what would be right, for quantised weights, biases, attention over a window,
    an activation other than SiLU, a routing variant that the architecture's layers do not have, and a size that is none."""
    for key in _COUNTS:
        value = config.get(key)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise UserError(f"{name}: {key} is {value!r}; it must be a whole number of at least 1")
    quantisation = config.get("quantization_config") or config.get("compression_config")
    if quantisation:
        method = quantisation.get("quant_method", "unknown") if isinstance(quantisation, Mapping) else quantisation
        raise UserError(f"{name}: weights are quantised ({method}); convert them to float32, bfloat16 or float16 first")
    for key in ("attention_bias", "mlp_bias", "use_bias", "qkv_bias"):
        if config.get(key):
            raise UserError(f"{name}: {key} is set; attention and FFN here have no biases")
    window, windowed = config.get("sliding_window"), config.get("use_sliding_window", True)
    if window is not None and windowed and window < config.get("max_position_embeddings", 0):
        raise UserError(f"{name}: sliding_window is {window}; attention here sees the whole context")
    activation = config.get("hidden_act", "silu")
    if activation not in ("silu", "swish"):
        raise UserError(f"{name}: hidden_act is {activation!r}; FFNs here compute silu")
    _refuse_routing(config, name)


def _refuse_routing(config: Mapping[str, Any], name: str) -> None:
    architecture = config.get("model_type", "")
    for key, known in (
        ("scoring_func", (_SCORING.get(architecture),)),
        ("topk_method", _CHOICES.get(architecture, ())),
        ("norm_topk_prob", (_RENORMALISES.get(architecture),)),
    ):
        value = config.get(key)
        if value is not None and known not in ((), (None,)) and value not in known:
            raise UserError(f"{name}: {key} is {value!r}; for {architecture} it must be {' or '.join(map(str, known))}")
