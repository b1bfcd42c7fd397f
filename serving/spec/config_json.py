"""From a Hugging Face `config.json` to a :class:`ModelSpec`: the only code that reads one.

Five architectures are known: `mixtral`, `deepseek` (DeepSeek-MoE), `deepseek_v2`, `qwen3_moe` and `glm4_moe_lite`, with the
keys of their published configs and those that `transformers` 5 writes.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from serving.errors import UserError
from serving.spec.shapes import GQASpec, MLASpec, ModelSpec, MoESpec, RopeSpec, element_bytes
from serving.spec.unsupported import refuse_unsupported


def load_spec(directory: str | Path, name: str | None = None) -> ModelSpec:
    """The spec of the checkpoint in `directory`. Raises :class:`UserError` for a missing, broken or unknown config."""
    path = Path(directory) / "config.json"
    try:
        config = json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; a checkpoint directory holds config.json and *.safetensors") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as JSON ({error})") from None
    if not isinstance(config, dict):
        raise UserError(f"{path}: holds a JSON {type(config).__name__}; an object with the model's sizes is wanted")
    try:
        return spec_from_config(config, name or Path(directory).resolve().name)
    except KeyError as error:
        raise UserError(f"{path}: missing key {error}") from None
    except (TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{path}: a value is not of the kind that its key asks for ({error})") from None


def spec_from_config(config: dict[str, Any], name: str) -> ModelSpec:
    """The spec that a Hugging Face `config.json`, parsed, describes (old `rope_scaling` and new `rope_parameters` keys)."""
    architecture = config.get("model_type", "")
    try:
        parse = _PARSERS[architecture]
    except KeyError:
        raise UserError(f"{name}: unknown architecture {architecture!r}; known: {', '.join(_PARSERS)}") from None
    refuse_unsupported(config, name)
    attention, moe, dense_layers, interleaved = parse(config)
    rope_dim = attention.rope_dim if isinstance(attention, MLASpec) else attention.head_dim
    dtype = config.get("dtype") or config.get("torch_dtype") or "float32"
    element_bytes(dtype)
    return ModelSpec(
        name=name,
        architecture=architecture,
        num_layers=config["num_hidden_layers"],
        hidden_size=config["hidden_size"],
        vocab_size=config["vocab_size"],
        attention=attention,
        moe=moe,
        rope=_rope(config, rope_dim, interleaved, name),
        dense_width=config["intermediate_size"] if dense_layers else 0,
        dense_layers=dense_layers,
        norm_eps=_positive(config, "rms_norm_eps", 1e-6),
        max_context_tokens=config["max_position_embeddings"],
        tied_head=bool(config.get("tie_word_embeddings", False)),
        dtype=dtype,
        eos_token_ids=_token_ids(config.get("eos_token_id")),
    )


def _positive(config: dict[str, Any], key: str, default: float) -> float:
    value = config.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
        raise TypeError(f"{key} is {value!r}, not a positive number")
    return value


def _token_ids(value: Any) -> tuple[int, ...]:
    ids = () if value is None else tuple(value) if isinstance(value, list) else (value,)
    if not all(isinstance(token, int) for token in ids):
        raise TypeError(f"eos_token_id is {value!r}, neither a token id nor a list of them")
    return ids


def _rope(config: dict[str, Any], dim: int, interleaved: bool, name: str) -> RopeSpec:
    new, old = config.get("rope_parameters") or {}, config.get("rope_scaling") or {}
    scaling = {**old, **new}
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    theta = _positive({**config, **new}, "rope_theta", 10000.0)
    if kind == "default":
        return RopeSpec(theta=theta, dim=dim, interleaved=interleaved)
    if kind not in ("linear", "yarn"):
        raise UserError(f"{name}: unknown RoPE scaling {kind!r}; known: default, linear, yarn")
    return RopeSpec(
        theta=theta,
        dim=dim,
        scaling=kind,
        interleaved=interleaved,
        factor=float(scaling["factor"]),
        original_context_tokens=scaling.get("original_max_position_embeddings", config["max_position_embeddings"]),
        beta_fast=scaling.get("beta_fast") or 32.0,
        beta_slow=scaling.get("beta_slow") or 1.0,
        mscale=scaling.get("mscale") or 0.0,
        mscale_all_dim=scaling.get("mscale_all_dim") or 0.0,
    )


def _num_experts(config: dict[str, Any]) -> int:
    """The routed experts of one layer; published configs and `transformers` 5 name the same number differently."""
    for key in ("n_routed_experts", "num_experts", "num_local_experts"):
        if key in config:
            return config[key]
    raise KeyError("num_experts")


def _gqa(config: dict[str, Any], qk_norm: bool = False) -> GQASpec:
    heads = config["num_attention_heads"]
    return GQASpec(
        num_heads=heads,
        num_kv_heads=config.get("num_key_value_heads") or heads,
        head_dim=config.get("head_dim") or config["hidden_size"] // heads,
        qk_norm=qk_norm,
    )


def _mla(config: dict[str, Any]) -> MLASpec:
    return MLASpec(
        num_heads=config["num_attention_heads"],
        kv_rank=config["kv_lora_rank"],
        rope_dim=config["qk_rope_head_dim"],
        nope_dim=config["qk_nope_head_dim"],
        value_dim=config["v_head_dim"],
        q_rank=config.get("q_lora_rank"),
    )


def _mixtral(config: dict[str, Any]):
    moe = MoESpec(
        num_experts=_num_experts(config),
        top_k=config["num_experts_per_tok"],
        expert_width=config["intermediate_size"],
        routing="softmax_topk_renorm",
    )
    return _gqa(config), moe, (), False


def _qwen3_moe(config: dict[str, Any]):
    step, only_dense = config.get("decoder_sparse_step", 1), config.get("mlp_only_layers") or []
    dense = tuple(i for i in range(config["num_hidden_layers"]) if i in only_dense or (i + 1) % step)
    moe = MoESpec(
        num_experts=_num_experts(config),
        top_k=config["num_experts_per_tok"],
        expert_width=config["moe_intermediate_size"],
        routing="softmax_renorm" if config.get("norm_topk_prob", False) else "softmax",
    )
    return _gqa(config, qk_norm=True), moe, dense, False


def _deepseek_moe(config: dict[str, Any], routing: str) -> tuple[MoESpec, tuple[int, ...]]:
    first = config.get("first_k_dense_replace", 0)
    step = config.get("moe_layer_freq", 1)
    dense = tuple(i for i in range(config["num_hidden_layers"]) if i < first or i % step)
    if config.get("mlp_layer_types"):
        dense = tuple(i for i, kind in enumerate(config["mlp_layer_types"]) if kind == "dense")
    grouped = config.get("topk_method", "noaux_tc" if routing == "sigmoid_bias" else "greedy") != "greedy"
    moe = MoESpec(
        num_experts=_num_experts(config),
        top_k=config["num_experts_per_tok"],
        expert_width=config["moe_intermediate_size"],
        routing=routing,
        shared_width=(config.get("n_shared_experts") or 0) * config["moe_intermediate_size"],
        routed_scale=config.get("routed_scaling_factor") or 1.0,
        num_groups=(config.get("n_group") or 1) if grouped else 1,
        top_groups=(config.get("topk_group") or 1) if grouped else 1,
    )
    return moe, dense


def _deepseek(config: dict[str, Any]):
    moe, dense = _deepseek_moe(config, "softmax_renorm" if config.get("norm_topk_prob") else "softmax")
    return _gqa(config), moe, dense, False


def _deepseek_v2(config: dict[str, Any]):
    moe, dense = _deepseek_moe(config, "softmax")
    return _mla(config), moe, dense, True


def _glm4_moe_lite(config: dict[str, Any]):
    # first_k_dense_replace = 1 is this architecture's default; published configs leave it out or say 1.
    moe, dense = _deepseek_moe({"first_k_dense_replace": 1, **config}, "sigmoid_bias")
    return _mla(config), moe, dense, config.get("rope_interleave", True)


_PARSERS = {
    "mixtral": _mixtral,
    "deepseek": _deepseek,
    "deepseek_v2": _deepseek_v2,
    "qwen3_moe": _qwen3_moe,
    "glm4_moe_lite": _glm4_moe_lite,
}

ARCHITECTURES = tuple(_PARSERS)
