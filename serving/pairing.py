"""Which model steps next beside what is in flight: batches whose stages fill each other's gaps. A pure policy.

Two in-flight batches alternate between the attention device and the FFN device. While one is in attention the other is in its
FFN, so a pair costs max(attention of one, FFN of the other) and then the same the other way round; a batch of short stages
beside one of long stages waits (the paper's second limit). Batches whose times are complements of each other waste nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from serving.batching import least_recently_served
from serving.errors import UserError
from serving.spec import ModelSpec, element_bytes

PAIRINGS = ("fair", "profile")
_PATIENCE_ROUNDS = 2  # a ready model is passed over for at most so many steps of every model


@dataclass(frozen=True)
class StageProfile:
    """How long one layer's attention and FFN take, in a unit common to all models."""

    attention: float
    ffn: float

    def __post_init__(self) -> None:
        if not (self.attention > 0 and self.ffn > 0):
            raise UserError(f"stages of {self.attention} and {self.ffn}; both take time")


def stage_profile(spec: ModelSpec, dtype: str, batch: int, context_tokens: float) -> StageProfile:
    """A decode step's stages of `batch` sequences of `context_tokens` tokens, in bytes that a layer has to read: weights, of
    as many distinct experts as uniform routing hits, and KV. Right where memory bounds both halves, as it does at decode."""
    size, layers = element_bytes(dtype), spec.num_layers
    attention = spec.attention_elements / layers * size + batch * context_tokens * spec.kv_bytes_per_token_layer(dtype)
    idle_experts = spec.moe.num_experts - spec.moe.distinct_experts(batch)
    routed = layers - len(spec.dense_layers)
    elements = (
        sum(spec.ffn_layer_elements(layer) for layer in range(layers)) - routed * idle_experts * spec.expert_elements
    )
    return StageProfile(attention, elements / layers * size)


def overlap(one: StageProfile, other: StageProfile) -> float:
    """Busy share of the two devices while a batch of `one` and a batch of `other` alternate: in (0, 1], 1 where each one's
    attention takes as long as the other's FFN."""
    period = max(one.attention, other.ffn) + max(one.ffn, other.attention)
    return (one.attention + one.ffn + other.attention + other.ffn) / (2 * period)


def best_partner(
    ready: Sequence[int], served_at: Mapping[int, int], in_flight: Sequence[int], profiles: Sequence[StageProfile]
) -> int:
    """Of the half of `ready` that was served longest ago, the model that overlaps best with those `in_flight`; ties, and a
    device with nothing in flight, go to the one least recently served. `served_at` numbers each model's last step.

    Only the order changes, hardly the shares: a model that overlaps best with itself would else take all turns. One that was
    passed over for two rounds goes first, whatever is in flight, so none starves.
    """
    oldest = least_recently_served(ready, served_at)
    now = max(served_at.values(), default=0)
    if not in_flight or now - served_at.get(oldest, 0) >= _PATIENCE_ROUNDS * len(profiles):
        return oldest
    by_age = sorted(ready, key=lambda model: (served_at.get(model, -1), model))
    candidates = by_age[: (len(by_age) + 1) // 2]
    return max(candidates, key=lambda model: sum(overlap(profiles[model], profiles[other]) for other in in_flight))
