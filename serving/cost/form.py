"""What a cost form is, what is known of a kernel, and the few shapes of curve that forms are put together from."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from serving.cost.hardware import Hardware

Columns = Mapping[str, Any]
Coefficients = Mapping[str, float]
TILE = 128  # rows and columns of an output tile, tokens of a KV block: what the measured libraries use at BF16
US, NS = 1e-6, 1e-9
SM_BANDWIDTH = 20e9  # bytes/s of the imagined multiprocessor on which `k_ns` and `token_ns` are stated


@dataclass(frozen=True)
class Kernel:
    """What is known about how one measured kernel cuts its work, read from its source or its launch rule."""

    max_splits: int = 128  # parts one sequence's KV may be cut into
    min_blocks: int = 0  # KV of this many blocks or fewer is never cut
    fixed_splits: int = 0  # always this many parts, whatever the load
    group_heads: int = 64  # query heads that share one thread block
    blocks_per_group: int = 1
    kv_block: int = TILE
    whole_waves: bool = True  # a last wave costs as much as a full one
    padded_kv: bool = False  # a partly filled KV block costs as much as a full one
    host_floor: bool = False  # measured with eager launches that the device outruns
    cast_bytes: int = 2  # bytes of an element
    latent_heads: int = 64  # heads that arithmetic is padded to (MLA)


@dataclass(frozen=True)
class Form:
    """One operator's form: its function, its key columns, and where its coefficients start and may go."""

    operator: str
    cost: Callable[[Coefficients, Columns, Hardware, Kernel], Any]
    shape: tuple[str, ...]  # columns that make a "shape"; splits never cut through one
    size: tuple[str, ...]  # columns that grow within a shape
    initial: Mapping[str, float]
    bounds: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    split: tuple[str, ...] = ()  # columns that a split goes by where the shape alone has too few values

    @property
    def split_columns(self) -> tuple[str, ...]:
        return self.split or self.shape


def soft_max(q: float, *terms):
    """(sum of terms^q)^(1/q): the largest term for large q, their sum for q = 1. Terms are not negative."""
    largest = terms[0]
    for term in terms[1:]:
        largest = np.maximum(largest, term)
    safe = np.maximum(largest, 1e-30)
    return safe * sum((term / safe) ** q for term in terms) ** (1.0 / q)


def peak(hw: Hardware, kernel: Kernel) -> float:
    """FLOP/s of the card in the kernel's element width."""
    return hw.fp32_flops if kernel.cast_bytes == 4 else hw.bf16_flops


def serial_scale(hw: Hardware) -> float:
    """How much slower than the imagined multiprocessor one of `hw` streams: its share of the memory bandwidth."""
    return SM_BANDWIDTH * hw.num_sms / hw.memory_bandwidth


def waves(blocks, slots, whole: bool):
    """Rounds that `blocks` thread blocks take on `slots` places, at least one."""
    rounds = np.maximum(blocks / slots, 1.0)
    return np.ceil(rounds) if whole else rounds
