"""The copy of weights from the host store to a device's arena, unit by unit, on a thread that holds no interpreter lock while
it copies.

The thread runs on the device's own core, where copying and computing share it, or on the others, as a DMA engine would: which
of the two is stated by the run. `link_gbps` slows it to the bandwidth of a link; the thread then sleeps between chunks, and
the core is free meanwhile.
"""

from __future__ import annotations

import os
import queue
import threading
import time
from dataclasses import dataclass

from serving.memory.streaming import copy, prepare
from serving.residency.arena import DeviceArena
from serving.residency.store import StoreClient

_CHUNK_BYTES = 4 << 20
_SHORTEST_SLEEP_S = 2e-4  # below that a sleep takes longer than asked for


@dataclass(frozen=True)
class Loaded:
    """A load that ended: the model, and nanoseconds of copying and of reading its checkpoint."""

    model: int
    copied_bytes: int
    weights_ns: int
    checkpoint_ns: int


class Loader:
    """Loads one model at a time. `units[model]` says how many of its units are there, as it happens."""

    def __init__(
        self, store: StoreClient, arena: DeviceArena, units: list[int], cores: set[int] | None, link_gbps: float | None
    ) -> None:
        """On `cores` (None: where its process runs) and at most at `link_gbps` gigabytes a second (None: as fast as it goes)."""
        prepare()
        self._store, self._arena, self._units = store, arena, units
        self._cores = cores
        self._bytes_per_s = None if link_gbps is None else link_gbps * 1e9
        self._jobs: queue.SimpleQueue[int | None] = queue.SimpleQueue()
        self._done: queue.SimpleQueue[Loaded | BaseException] = queue.SimpleQueue()
        self._progress = threading.Event()
        self.busy = False
        self._thread = threading.Thread(target=self._run, name="loader", daemon=True)
        self._thread.start()

    def start(self, model: int) -> None:
        """Begin to load `model`, which has no pages yet."""
        self.busy = True
        self._jobs.put(model)

    def poll(self) -> Loaded | None:
        """The load that has ended since, if one has. Raises what went wrong in it."""
        if not self.busy or self._done.empty():
            return None
        self.busy = False
        done = self._done.get()
        if isinstance(done, BaseException):
            raise done
        return done

    def wait(self, longest_s: float) -> None:
        """Sleep until another unit is there, or for `longest_s`."""
        self._progress.clear()
        self._progress.wait(longest_s)

    def load_now(self, model: int) -> Loaded:
        """Load `model` and wait for it."""
        self.start(model)
        while (done := self.poll()) is None:
            self.wait(0.01)
        return done

    def close(self) -> None:
        self._jobs.put(None)
        self._thread.join()

    # -- on the thread -------------------------------------------------------------------------------------------------
    def _run(self) -> None:
        if self._cores:
            os.sched_setaffinity(0, self._cores)
        while (model := self._jobs.get()) is not None:
            try:
                done: Loaded | BaseException = self._load(model)
            except BaseException as error:  # noqa: BLE001  raised where the load is asked for
                done = error
            self._done.put(done)
            self._progress.set()

    def _load(self, model: int) -> Loaded:
        source, checkpoint_ns = self._store.acquire(model)
        try:
            started_ns = time.monotonic_ns()
            space = self._arena.open(model)
            copied = 0
            for number, extents in enumerate(space.units):
                for extent in extents:
                    for offset, (address, length) in source.pieces(*extent):
                        copied = self._copy(space.address + offset, address, length, started_ns, copied)
                self._units[model] = number + 1
                self._progress.set()
            return Loaded(model, copied, time.monotonic_ns() - started_ns, checkpoint_ns)
        finally:
            self._store.release(model)

    def _copy(self, target: int, source: int, length: int, started_ns: int, copied: int) -> int:
        """Copy `length` bytes and wait until the link would have brought them; returns all bytes copied so far."""
        if self._bytes_per_s is None:
            copy(target, source, length)
            return copied + length
        for offset in range(0, length, _CHUNK_BYTES):
            size = min(_CHUNK_BYTES, length - offset)
            copy(target + offset, source + offset, size)
            copied += size
            ahead_s = copied / self._bytes_per_s - (time.monotonic_ns() - started_ns) / 1e9
            if ahead_s > _SHORTEST_SLEEP_S:
                time.sleep(ahead_s)
        return copied
