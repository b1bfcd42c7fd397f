"""Bytes that a model asks of a device, for planning: computed before anything is loaded, charged when it is.

`plan` of every system adds up the same numbers: packed weights of either half, KV pages, and the workspace of one step.
"""

from __future__ import annotations

from collections.abc import Sequence

from kernels.attention import gqa_scratch_bytes
from kernels.mla import mla_scratch_bytes
from serving.batching import StepLimits
from serving.errors import CapacityError
from serving.interface import Device, ServedModel
from serving.layers.sizes import weight_bytes_attention, weight_bytes_ffn
from serving.memory.budget import format_bytes
from serving.memory.kv_pool import KVGeometry
from serving.parallel.ffn_part import WHOLE_FFN, FFNPart
from serving.spec import MLASpec, element_bytes

_MOST_SMS = 160  # at least as many multiprocessors as any card has that is planned for (conf/hardware; a B200 has 148)


def attention_bytes(model: ServedModel) -> int:
    """Weights of the attention half as loaded: projections, norms, embedding, LM head."""
    return weight_bytes_attention(model.spec, model.dtype)


def ffn_bytes(model: ServedModel, part: FFNPart = WHOLE_FFN) -> int:
    """Weights of the FFN half as loaded, or of a `part` of it: routers, experts, shared experts, dense layers."""
    return weight_bytes_ffn(part.model(model).spec, model.dtype, part.layers)


def attention_workspace_bytes(model: ServedModel, limits: StepLimits, kind: str) -> int:
    """Of one step, beside the KV, on a device of `kind`. Activations: five hidden-sized rows, queries and their outputs, and the
    logits; and what a card's attention keeps of partial results, which every layer and model takes again. Each lane needs as
    much as its largest model."""
    spec, attention = model.spec, model.spec.attention
    if isinstance(attention, MLASpec):
        head_elements = 2 * (attention.kv_rank + attention.qk_dim) + attention.value_dim
    else:
        head_elements = 4 * attention.head_dim
    row_elements = 5 * spec.hidden_size + attention.num_heads * head_elements
    logits_bytes = 2 * 4 * limits.max_batch * spec.vocab_size
    scratch_bytes = _scratch_bytes(model, limits) if kind == "cuda" else 0
    return limits.max_rows * row_elements * element_bytes(model.dtype) + logits_bytes + scratch_bytes


def _scratch_bytes(model: ServedModel, limits: StepLimits) -> int:
    """Of one layer's attention on a card, of decode rows and a chunk."""
    attention, sizes = model.spec.attention, (limits.max_batch, limits.prefill_chunk)
    if isinstance(attention, MLASpec):
        return mla_scratch_bytes(*sizes, attention.num_heads, attention.kv_rank, _MOST_SMS)
    return gqa_scratch_bytes(*sizes, attention.num_heads, attention.num_kv_heads, attention.head_dim, _MOST_SMS)


def ffn_workspace_bytes(model: ServedModel, limits: StepLimits) -> int:
    """Activations of one step in the FFN: gate, up and down of every routed row, and of the shared experts."""
    spec, moe = model.spec, model.spec.moe
    routed = moe.top_k * (3 * moe.expert_width + 2 * spec.hidden_size)
    width = max(spec.dense_width, moe.shared_width)
    return limits.max_rows * (routed + 3 * width + 2 * spec.hidden_size) * element_bytes(model.dtype)


def ffn_pool_bytes(models: Sequence[ServedModel], limits: StepLimits, lanes: int) -> int:
    """The whole FFNs of `models` in one pool on a card, where each of `lanes` has a stream of its own, with the workspace of a
    step."""
    workspace_bytes = max(ffn_workspace_bytes(model, limits) for model in models)
    return sum(ffn_bytes(model) for model in models) + lanes * workspace_bytes


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
