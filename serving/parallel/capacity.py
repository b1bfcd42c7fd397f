"""Bytes that one rank's share of a model asks of its device, from the same sums as a whole model's."""

from __future__ import annotations

import dataclasses

from serving.batching import StepLimits
from serving.capacity import attention_bytes, attention_workspace_bytes, ffn_bytes, ffn_workspace_bytes
from serving.interface import ServedModel
from serving.parallel.exchange import ExchangeShape
from serving.parallel.group import GroupPlan
from serving.parallel.share import share_spec
from serving.spec import element_bytes

_SAMPLED_BYTES = 16  # a logit and a token id, as posted


def share_model(model: ServedModel, group: GroupPlan, rank: int) -> ServedModel:
    """The share of `rank` as a model of its own: its spec says what weights, KV and workspace it takes."""
    return dataclasses.replace(model, spec=share_spec(model.spec, group.share(rank)))


def share_weights_bytes(model: ServedModel, group: GroupPlan, rank: int) -> int:
    share = share_model(model, group, rank)
    return attention_bytes(share) + ffn_bytes(share)


def exchange_shape(model: ServedModel, group: GroupPlan, limits: StepLimits) -> ExchangeShape:
    """Room for the rows of all replicas, which is the most that a rank ever posts."""
    row_bytes = max(model.spec.hidden_size * element_bytes(model.dtype), _SAMPLED_BYTES)
    return ExchangeShape(group.ranks, limits.max_rows * group.dp * row_bytes if group.ranks > 1 else 0)


def share_workspace_bytes(model: ServedModel, group: GroupPlan, rank: int, limits: StepLimits, kind: str) -> int:
    """Of one step on a device of `kind`; the FFN's activations are of the rows of all replicas."""
    share = share_model(model, group, rank)
    return attention_workspace_bytes(share, limits, kind) + group.dp * ffn_workspace_bytes(share, limits)
