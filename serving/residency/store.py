"""The host cache: images of models in one memory file that all devices of a host share, at most a budget of bytes.

What is not there is read from its checkpoint, and others make room. Each process maps an image where it wants it; who holds
what stands in a small shared directory under a file lock, which a process holds for microseconds, never while it reads.
"""

from __future__ import annotations

import contextlib
import fcntl
import pickle
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from serving.interface import ServedModel
from serving.memory.pages import contiguous_runs
from serving.memory.virtual import PhysicalPages, VirtualRange
from serving.residency.arena import pages_of_image
from serving.residency.eviction import Candidate, eviction_order
from serving.residency.image import PAGE_BYTES, write_image
from serving.shm.region import SharedRegion

_DIRECTORY_BYTES = 8 << 20
_LENGTH_BYTES = 8
_LOOK_AGAIN_S = 0.001


@dataclass(frozen=True)
class StoreRef:
    """A store as another process finds it."""

    pages_fd: int
    directory_fd: int
    num_pages: int
    eviction: str

    @property
    def fds(self) -> list[int]:
        return [self.pages_fd, self.directory_fd]


@dataclass
class _Entry:
    """An image in the store, or being written to it."""

    pages: list[int]
    ready: bool = False
    pins: int = 0
    used_ns: int = 0
    read_ns: int = 0  # what reading its checkpoint took


@dataclass
class _Directory:
    free: list[int]
    entries: dict[int, _Entry] = field(default_factory=dict)


@dataclass(frozen=True)
class _Attached:
    """Pages of another process's memory file."""

    fd: int
    page_bytes: int = PAGE_BYTES


class HostStore:
    """The store's owner: makes it, hands out its reference, and closes it."""

    def __init__(self, budget_bytes: int, eviction: str) -> None:
        self._physical = PhysicalPages(budget_bytes // PAGE_BYTES, PAGE_BYTES)
        self._directory = SharedRegion(_DIRECTORY_BYTES)
        num_pages = self._physical.num_pages
        self.ref = StoreRef(self._physical.fd, self._directory.fd, num_pages, eviction)
        _write(self._directory, _Directory(free=list(range(num_pages))))

    def close(self) -> None:
        self._physical.close()
        self._directory.close()


class StoreClient:
    """A process's view of the store. Models go by their numbers in `models`, the same in every process."""

    def __init__(self, ref: StoreRef, models: Sequence[ServedModel]) -> None:
        self._ref, self._models = ref, models
        self._directory = SharedRegion(_DIRECTORY_BYTES, fd=ref.directory_fd)
        self._physical = _Attached(ref.pages_fd)
        self._ranges = [VirtualRange(pages_of_image(model) * PAGE_BYTES) for model in models]
        self._mapped: list[list[int]] = [[] for _ in models]
        self.misses = 0  # images that were read from checkpoints

    def acquire(self, model: int) -> tuple[int, int]:
        """(address of the image of `model`, nanoseconds spent on reading its checkpoint, 0 where it was there). It stays until
        `release`; one process holds one at a time, so that a store of the largest model's size cannot be locked up."""
        while True:
            with self._locked() as directory:
                entry = directory.entries.get(model)
                if entry is not None and entry.ready:
                    entry.pins += 1
                    entry.used_ns = time.monotonic_ns()
                    self._map(model, entry.pages)
                    return self._ranges[model].address, 0
                pages = None if entry is not None else self._make_room(directory, pages_of_image(self._models[model]))
                if pages is not None:
                    directory.entries[model] = _Entry(pages, pins=1, used_ns=time.monotonic_ns())
                    break
            time.sleep(_LOOK_AGAIN_S)  # somebody writes it, or others hold all that there is
        return self._fill(model, pages)

    def release(self, model: int) -> None:
        with self._locked() as directory:
            directory.entries[model].pins -= 1

    def prime(self, models: Sequence[int]) -> None:
        """Read the images of `models` as long as there is room, so that the first load need not."""
        for model in models:
            with self._locked() as directory:
                fits = model not in directory.entries and len(directory.free) >= pages_of_image(self._models[model])
            if fits:
                self.acquire(model)
                self.release(model)
        self.misses = 0

    def held(self) -> set[int]:
        """Models whose images are there."""
        with self._locked() as directory:
            return {model for model, entry in directory.entries.items() if entry.ready}

    def close(self) -> None:
        for one in self._ranges:
            one.close()
        self._directory.close()

    def _fill(self, model: int, pages: list[int]) -> tuple[int, int]:
        started_ns = time.monotonic_ns()
        self._map(model, pages)
        try:
            write_image(self._models[model], self._ranges[model].address)
        except BaseException:
            with self._locked() as directory:
                directory.free.extend(directory.entries.pop(model).pages)
            raise
        took_ns = time.monotonic_ns() - started_ns
        with self._locked() as directory:
            entry = directory.entries[model]
            entry.ready, entry.read_ns = True, took_ns
        self.misses += 1
        return self._ranges[model].address, took_ns

    def _make_room(self, directory: _Directory, needed: int) -> list[int] | None:
        """`needed` free pages, after others have gone if need be; None, changing nothing, where those in use leave too few."""
        idle = [
            Candidate(number, len(entry.pages), entry.used_ns, entry.read_ns)
            for number, entry in directory.entries.items()
            if entry.ready and not entry.pins
        ]
        if len(directory.free) + sum(one.pages for one in idle) < needed:
            return None
        for one in eviction_order(idle, self._ref.eviction, time.monotonic_ns()):
            if len(directory.free) >= needed:
                break
            directory.free.extend(directory.entries.pop(one.key).pages)
        directory.free.sort()
        pages, directory.free = directory.free[:needed], directory.free[needed:]
        return pages

    def _map(self, model: int, pages: list[int]) -> None:
        if self._mapped[model] == pages:
            return
        offset = 0
        for first, count in contiguous_runs(pages):
            self._ranges[model].map(offset, self._physical, first, count)
            offset += count * PAGE_BYTES
        self._mapped[model] = list(pages)

    @contextlib.contextmanager
    def _locked(self) -> Iterator[_Directory]:
        """The directory, written back at the end. Locks of this kind are a process's, so one thread of each uses a store."""
        fcntl.lockf(self._directory.fd, fcntl.LOCK_EX)
        try:
            length = int.from_bytes(self._directory.bytes[:_LENGTH_BYTES], "little")
            directory = pickle.loads(self._directory.bytes[_LENGTH_BYTES : _LENGTH_BYTES + length])
            yield directory
            _write(self._directory, directory)
        finally:
            fcntl.lockf(self._directory.fd, fcntl.LOCK_UN)


def _write(region: SharedRegion, directory: _Directory) -> None:
    data = pickle.dumps(directory, protocol=pickle.HIGHEST_PROTOCOL)
    region.bytes[_LENGTH_BYTES : _LENGTH_BYTES + len(data)] = data
    region.bytes[:_LENGTH_BYTES] = len(data).to_bytes(_LENGTH_BYTES, "little")
