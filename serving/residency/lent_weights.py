"""One engine's weights in pages that engines beside it borrow too, so that weights which are not needed become KV of others.

Halves are built once, over an address that stays; pages are mapped under it while the weights are there. They come from a copy
in host memory, made at the start, in one go: an engine with nothing but this model has nothing to do meanwhile.
"""

from __future__ import annotations

import ctypes
import time

import torch

from serving.interface import ServedModel
from serving.layers.attention_half import AttentionHalf
from serving.layers.ffn_half import FFNHalf
from serving.memory.kv_pool import KVPool
from serving.memory.lent import SharedPageLender
from serving.memory.pages import contiguous_runs
from serving.memory.virtual import VirtualRange
from serving.residency.image import halves_over, image_bytes, write_image
from serving.workers.counters import Counters


class LentWeights:
    """The weights of `model` in pages of `pool`, absent at first."""

    attention: AttentionHalf
    ffn: FFNHalf

    def __init__(self, model: ServedModel, pool: KVPool, lender: SharedPageLender, counters: Counters) -> None:
        self._pool, self._lender, self._counters = pool, lender, counters
        self._bytes = image_bytes(model, pool.page_bytes)
        self._range = VirtualRange(self._bytes)
        self.attention, self.ffn = halves_over(model, self._range.address)
        self._host = torch.empty(image_bytes(model), dtype=torch.uint8)
        _, self._used_bytes = write_image(model, self._host.data_ptr())
        self._lent: list[int] = []
        self._wanted_ns: int | None = None

    def start(self) -> None:
        """Be there from the start, which is no swap. Raises CapacityError where pages are missing."""
        self._load(self._lender.lend(self._bytes // self._pool.page_bytes))

    def bring(self) -> bool:
        """Load the weights if there are pages for them; else claim those, so that they come free."""
        started_ns = time.monotonic_ns()
        self._wanted_ns = self._wanted_ns or started_ns
        count = self._bytes // self._pool.page_bytes
        with self._lender.deciding():
            if count > self._lender.free_pages:
                self._lender.claim(count)
                return False
            self._lender.claim(0)
            lent = self._lender.lend(count)
        self._load(lent)
        self._counters.add("swaps", 1)
        self._counters.add("loaded_bytes", self._used_bytes)
        self._counters.add("switch_queue_ns", started_ns - self._wanted_ns)
        self._counters.add("switch_weights_ns", time.monotonic_ns() - started_ns)
        self._wanted_ns = None
        return True

    def evict(self) -> None:
        """Unmap the weights and give their pages to whoever wants them."""
        started_ns = time.monotonic_ns()
        self._range.unmap(0, self._bytes)
        self._lender.give_back(self._lent)
        self._lent = []
        self._counters.add("switch_evict_ns", time.monotonic_ns() - started_ns)

    def _load(self, lent: list[int]) -> None:
        self._lent, offset = lent, 0
        for first, count in contiguous_runs(lent):
            self._range.map(offset, self._pool.physical, first, count)
            offset += count * self._pool.page_bytes
        ctypes.memmove(self._range.address, self._host.data_ptr(), self._used_bytes)
