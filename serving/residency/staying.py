"""Weights that stay: each half over memory of its own, as the images of models that come and go lie in theirs.

Huge pages, where the system gives them, are what a processor reads weights faster from (`serving/sim/README.md` has numbers), so
every system on CPU devices has them or none has.
"""

from __future__ import annotations

import weakref
from collections.abc import Collection
from typing import TypeVar

import torch

from serving.checkpoints import Weights
from serving.layers.attention_half import AttentionHalf
from serving.layers.ffn_half import FFNHalf
from serving.layers.sizes import weight_bytes_attention, weight_bytes_ffn
from serving.memory.virtual import FRAME_BYTES, VirtualRange
from serving.residency.image import Placer, alignment_bytes
from serving.spec import ModelSpec

_Half = TypeVar("_Half", AttentionHalf, FFNHalf)


def load_attention(weights: Weights, dtype: str) -> AttentionHalf:
    """The attention half of `weights`, read into memory that lives as long as the half does."""
    memory, placer = _room(weights.spec, weight_bytes_attention(weights.spec, dtype))
    return _owning(memory, AttentionHalf(weights.spec, weights, getattr(torch, dtype), placer.keep))


def load_ffn(weights: Weights, dtype: str, layers: Collection[int] | None = None) -> FFNHalf:
    """The same of the FFN half, of some `layers` where given."""
    memory, placer = _room(weights.spec, weight_bytes_ffn(weights.spec, dtype, layers))
    return _owning(memory, FFNHalf(weights.spec, weights, getattr(torch, dtype), layers, placer.keep))


def _room(spec: ModelSpec, weight_bytes: int) -> tuple[VirtualRange, Placer]:
    """Memory for tensors of `weight_bytes`, which is taken as they are put there, and who puts them there."""
    limit_bytes = weight_bytes + alignment_bytes(spec)
    memory = VirtualRange(limit_bytes, align_bytes=FRAME_BYTES)
    memory.open()
    return memory, Placer(memory.address, limit_bytes, spec.num_layers + 1, write=True)


def _owning(memory: VirtualRange, half: _Half) -> _Half:
    weakref.finalize(half, memory.close).atexit = False  # the end of the process is the end of it too
    return half
