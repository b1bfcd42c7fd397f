"""A simulated host cache: the real one's bookkeeping, with checkpoints read one after the other at a disk's bandwidth."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from serving.interface import ServedModel
from serving.residency.arena import pages_of_image
from serving.residency.cache import HostCache
from serving.residency.image import PAGE_BYTES
from serving.sim.clock import VirtualClock


class SimulatedHostCache:
    """What devices of one host share. Models go by their numbers in `models`."""

    def __init__(
        self,
        clock: VirtualClock,
        models: Sequence[ServedModel],
        budget_bytes: int,
        eviction: str,
        disk_bandwidth: float,
    ) -> None:
        self._clock = clock
        self._pages = [pages_of_image(model) for model in models]
        self._cache = HostCache(budget_bytes // PAGE_BYTES, eviction)
        self._disk_bandwidth = disk_bandwidth
        self._disk_free_ns = 0
        self._waiting: list[tuple[int, Callable[[int], None]]] = []

    def prime(self, models: Sequence[int], resident: Sequence[int]) -> None:
        """Before the start: images of `models` as long as there is room, then those of `resident` as if just loaded from it."""
        for model in models:
            if model not in self._cache and self._cache.free_pages >= self._pages[model]:
                self._put(model)
        for model in resident:
            if self._cache.pin(model, 0) is None:
                self._put(model)
            else:
                self._cache.unpin(model)

    def acquire(self, model: int, then: Callable[[int], None]) -> None:
        """Call `then` once the image of `model` is there to stay until `release`, with nanoseconds of reading its checkpoint, 0
        where nothing was read for this call."""
        self._waiting.append((model, then))
        self._serve()

    def release(self, model: int) -> None:
        self._cache.unpin(model)
        self._serve()

    def _put(self, model: int) -> None:
        if self._cache.reserve(model, self._pages[model], 0) is not None:
            self._cache.written(model, self._read_ns(model))
            self._cache.unpin(model)

    def _read_ns(self, model: int) -> int:
        return round(self._pages[model] * PAGE_BYTES / self._disk_bandwidth * 1e9)

    def _serve(self) -> None:
        """Who waits for an image, in the order of asking, has it or begins to read it; who finds no room waits on."""
        asked, self._waiting = self._waiting, []
        for model, then in asked:
            now_ns = self._clock.now_ns()
            if self._cache.pin(model, now_ns) is not None:
                then(0)
            elif self._cache.reserve(model, self._pages[model], now_ns) is not None:
                self._disk_free_ns = max(now_ns, self._disk_free_ns) + self._read_ns(model)
                took_ns = self._disk_free_ns - now_ns
                self._clock.after(took_ns / 1e9, self._read(model, took_ns, then))
            else:
                self._waiting.append((model, then))

    def _read(self, model: int, took_ns: int, then: Callable[[int], None]) -> Callable[[], None]:
        def done() -> None:
            self._cache.written(model, took_ns)
            then(took_ns)
            self._serve()

        return done
