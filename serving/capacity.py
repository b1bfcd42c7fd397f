"""Bytes that a model asks of a device, for planning: computed before anything is loaded, charged when it is.

`plan` of every system adds up the same numbers: packed weights of either half, KV pages, and the workspace of one step.
"""

from __future__ import annotations

from collections.abc import Sequence

from serving.batching import StepLimits
from serving.errors import CapacityError
from serving.interface import Device, ServedModel
from serving.layers.sizes import weight_bytes_attention, weight_bytes_ffn
from serving.memory.budget import format_bytes
from serving.memory.kv_pool import KVGeometry
from serving.parallel.ffn_part import WHOLE_FFN, FFNPart
from serving.spec import MLASpec, element_bytes


def attention_bytes(model: ServedModel) -> int:
    """Weights of the attention half as loaded: projections, norms, embedding, LM head."""
    return weight_bytes_attention(model.spec, model.dtype)


def ffn_bytes(model: ServedModel, part: FFNPart = WHOLE_FFN) -> int:
    """Weights of the FFN half as loaded, or of a `part` of it: routers, experts, shared experts, dense layers."""
    return weight_bytes_ffn(part.model(model).spec, model.dtype, part.layers)


def attention_workspace_bytes(model: ServedModel, limits: StepLimits) -> int:
    """Activations of one step beside the KV: five hidden-sized rows, queries and their outputs, and the logits."""
    spec, attention = model.spec, model.spec.attention
    if isinstance(attention, MLASpec):
        head_elements = 2 * (attention.kv_rank + attention.qk_dim) + attention.value_dim
    else:
        head_elements = 4 * attention.head_dim
    row_elements = 5 * spec.hidden_size + attention.num_heads * head_elements
    logits_bytes = 2 * 4 * limits.max_batch * spec.vocab_size
    return limits.max_rows * row_elements * element_bytes(model.dtype) + logits_bytes


def ffn_workspace_bytes(model: ServedModel, limits: StepLimits) -> int:
    """Activations of one step in the FFN: gate, up and down of every routed row, and of the shared experts."""
    spec, moe = model.spec, model.spec.moe
    routed = moe.top_k * (3 * moe.expert_width + 2 * spec.hidden_size)
    width = max(spec.dense_width, moe.shared_width)
    return limits.max_rows * (routed + 3 * width + 2 * spec.hidden_size) * element_bytes(model.dtype)


def ffn_pool_bytes(models: Sequence[ServedModel], limits: StepLimits) -> int:
    """The whole FFNs of `models` in one pool, which computes one step at a time."""
    return sum(ffn_bytes(model) for model in models) + max(ffn_workspace_bytes(model, limits) for model in models)


def require_kv(device: Device, pool: str, kv_bytes: int, page_bytes: int, models: Sequence[ServedModel]) -> None:
    """Raises CapacityError unless the pool holds at least one token of each of its models, one at a time."""
    for model in models:
        pages = KVGeometry.of(model.spec, model.dtype).pages(1, page_bytes)
        missing_bytes = pages * page_bytes - kv_bytes
        if missing_bytes > 0:
            raise CapacityError(
                f"{device.name}: KV pool {pool} would have {format_bytes(max(kv_bytes, 0))} left, one token of {model.name} needs "
                f"{format_bytes(pages * page_bytes)}; {missing_bytes} bytes are missing (more memory or smaller pages)"
            )


def require_weights(device: Device, used_bytes: int, what: str) -> None:
    """Raises CapacityError, naming the device and the missing bytes, when `used_bytes` exceed its memory."""
    missing_bytes = used_bytes - device.memory_bytes
    if missing_bytes > 0:
        raise CapacityError(
            f"{device.name}: {what} need {format_bytes(used_bytes)} of {format_bytes(device.memory_bytes)}; "
            f"{missing_bytes} bytes ({format_bytes(missing_bytes)}) are missing"
        )
