"""One engine's weights in pages that engines beside it borrow too, so that weights which are not needed become KV of others.

Halves are built once, over an address that stays; memory is put under it while the weights are there. They come from a copy in
host memory, made at the start. On a CPU device they come in one go: an engine with nothing but this model has nothing to do
meanwhile. On a card (serving/cuda/lent_weights.py) layers run as they come.
"""

from __future__ import annotations

import ctypes
import time
from typing import Protocol

import torch

from serving.interface import ServedModel
from serving.memory.kv_pool import KVPool
from serving.memory.lent import SharedPageLender
from serving.memory.pages import contiguous_runs
from serving.memory.virtual import VirtualRange
from serving.residency.image import halves_over, image_bytes, write_image
from serving.workers.counters import Counters

_LOOK_AGAIN_S = 1e-4


class Movable(Protocol):
    """Weights that take `pages` pages of their device while they are there; `used_bytes` of them are copied."""

    pages: int
    used_bytes: int

    def load(self, pages: list[int]) -> None:
        """Begin to come, over `pages` of the device; whoever computes with them meanwhile waits for what it needs."""
        ...

    def loaded(self) -> bool:
        """Whether all that was begun is there."""
        ...

    def leave(self) -> None:
        """Be nowhere on the device; nobody computes with them."""
        ...


class LentWeights:
    """Weights in pages that `lender` lends, which they have from now on; :meth:`start` brings them. Raises CapacityError where
    pages are missing."""

    def __init__(self, weights: Movable, lender: SharedPageLender, counters: Counters) -> None:
        self._weights, self._lender, self._counters = weights, lender, counters
        self._lent = lender.lend(weights.pages)
        self._wanted_ns: int | None = None
        self._began_ns: int | None = None  # of the load under way

    def start(self) -> None:
        """Be there from the start, which is no swap."""
        self._weights.load(self._lent)
        while not self._weights.loaded():
            time.sleep(_LOOK_AGAIN_S)

    def bring(self) -> bool:
        """Load the weights if there are pages for them; else claim those, so that they come free. Whether a step may begin, which
        waits for what it needs of them."""
        started_ns = time.monotonic_ns()
        self._wanted_ns = self._wanted_ns or started_ns
        with self._lender.deciding():
            if self._weights.pages > self._lender.free_pages:
                self._lender.claim(self._weights.pages)
                return False
            self._lender.claim(0)
            self._lent = self._lender.lend(self._weights.pages)
        self._counters.add("switch_queue_ns", started_ns - self._wanted_ns)
        self._wanted_ns, self._began_ns = None, started_ns
        self._weights.load(self._lent)
        self.poll()
        return True

    def poll(self) -> None:
        """Count a load that has ended since."""
        if self._began_ns is None or not self._weights.loaded():
            return
        self._counters.add("swaps", 1)
        self._counters.add("loaded_bytes", self._weights.used_bytes)
        self._counters.add("switch_weights_ns", time.monotonic_ns() - self._began_ns)
        self._began_ns = None

    def evict(self) -> None:
        """Take the weights away and give their pages to whoever wants them."""
        started_ns = time.monotonic_ns()
        self._weights.leave()
        self._lender.give_back(self._lent)
        self._lent = []
        self._counters.add("switch_evict_ns", time.monotonic_ns() - started_ns)


class MappedWeights:
    """The weights of `model` on a CPU device: pages of `pool`, mapped under an address that stays."""

    def __init__(self, model: ServedModel, pool: KVPool) -> None:
        self._pool = pool
        self._bytes = image_bytes(model, pool.page_bytes)
        self.pages = self._bytes // pool.page_bytes
        self._range = VirtualRange(self._bytes)
        self.attention, self.ffn = halves_over(model, self._range.address)
        self._host = torch.empty(image_bytes(model), dtype=torch.uint8)
        _, self.used_bytes = write_image(model, self._host.data_ptr())

    def load(self, pages: list[int]) -> None:
        offset = 0
        for first, count in contiguous_runs(pages):
            self._range.map(offset, self._pool.physical, first, count)
            offset += count * self._pool.page_bytes
        ctypes.memmove(self._range.address, self._host.data_ptr(), self.used_bytes)

    def loaded(self) -> bool:
        return True

    def leave(self) -> None:
        self._range.unmap(0, self._bytes)
