"""The host cache: images of models in one memory file that all devices of a host share, at most a budget of bytes.

What is not there is read from its checkpoint, and others make room. Every process maps the whole file once, as pinned host
memory is, so that no load waits for mapping; who holds what stands in a small shared directory under a file lock, which a
process holds for microseconds, never while it reads.
"""

from __future__ import annotations

import contextlib
import fcntl
import pickle
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from serving.interface import ServedModel
from serving.memory.virtual import PhysicalPages, VirtualRange
from serving.residency.arena import pages_of_image
from serving.residency.cache import HostCache
from serving.residency.frames import Run, total
from serving.residency.image import PAGE_BYTES, Extent, write_image
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

    @property
    def fds(self) -> list[int]:
        return [self.pages_fd, self.directory_fd]


class HostImage(NamedTuple):
    """Where the bytes of an image lie in this process: stretches of memory, in the image's order."""

    stretches: tuple[Extent, ...]  # address and length

    def pieces(self, start: int, length: int) -> Iterator[tuple[int, Extent]]:
        """The image's bytes [start, start + length): (offset in the image, (address, length)), a stretch each."""
        before = 0
        for address, count in self.stretches:
            first, last = max(start, before), min(start + length, before + count)
            if first < last:
                yield first, (address + first - before, last - first)
            before += count


class HostStore:
    """The store's owner: makes it, hands out its reference, and closes it."""

    def __init__(self, budget_bytes: int, eviction: str) -> None:
        self._physical = PhysicalPages(budget_bytes // PAGE_BYTES, PAGE_BYTES)
        self._directory = SharedRegion(_DIRECTORY_BYTES)
        num_pages = self._physical.num_pages
        self.ref = StoreRef(self._physical.fd, self._directory.fd, num_pages)
        _write(self._directory, HostCache(num_pages, eviction))

    def promise(self, models: Mapping[int, ServedModel]) -> None:
        """Promise pages to the images of `models`, by number, before any process has the reference. Whoever wants one of them
        waits until the client that is to :meth:`StoreClient.prime` it has read it: no checkpoint is read twice, and none for
        somebody who has requests to serve. Raises ValueError where they do not all fit."""
        cache = _read(self._directory)
        for number, model in models.items():
            if not cache.promise(number, pages_of_image(model)):
                raise ValueError(f"the host cache has no room for the image of {model.name}")
        _write(self._directory, cache)

    def close(self) -> None:
        self._physical.close()
        self._directory.close()


class StoreClient:
    """A process's view of the store. Models go by their numbers in `models`, the same in every process."""

    def __init__(self, ref: StoreRef, models: Sequence[ServedModel]) -> None:
        self._models = models
        self._directory = SharedRegion(_DIRECTORY_BYTES, fd=ref.directory_fd)
        self._physical = PhysicalPages(ref.num_pages, PAGE_BYTES, fd=ref.pages_fd)
        self._range = VirtualRange(ref.num_pages * PAGE_BYTES)
        self._range.map(0, self._physical, 0, ref.num_pages)

    def acquire(self, model: int) -> tuple[HostImage, int]:
        """(the image of `model`, nanoseconds spent on reading its checkpoint, 0 where it was there). It stays until `release`;
        one process holds one at a time, so that a store of the largest model's size cannot be locked up."""
        needed = pages_of_image(self._models[model])
        while True:
            with self._locked() as cache:
                runs = cache.pin(model, time.monotonic_ns())
                if runs is not None:
                    return self._image(runs), 0
                runs = cache.reserve(model, needed, time.monotonic_ns())
            if runs is not None:
                return self._image(runs), self._fill(model, runs)
            time.sleep(_LOOK_AGAIN_S)  # somebody writes it, or others hold all that there is

    def release(self, model: int) -> None:
        with self._locked() as cache:
            cache.unpin(model)

    def prime(self, models: Sequence[int]) -> None:
        """Read those of `models` whose images are promised and not read yet, so that no load need."""
        for model in models:
            with self._locked() as cache:
                runs = cache.claim(model)
            if runs is not None:
                self._fill(model, runs)
                self.release(model)

    def held(self) -> set[int]:
        """Models whose images are there."""
        with self._locked() as cache:
            return cache.held()

    def close(self) -> None:
        self._range.close()
        self._directory.close()

    def _image(self, runs: Sequence[Run]) -> HostImage:
        return HostImage(tuple((self._range.address + first * PAGE_BYTES, count * PAGE_BYTES) for first, count in runs))

    def _fill(self, model: int, runs: Sequence[Run]) -> int:
        """Read the checkpoint of `model` into the pages `runs`; nanoseconds that it took."""
        started_ns = time.monotonic_ns()
        whole = VirtualRange(total(runs) * PAGE_BYTES)
        try:
            offset = 0
            for first, count in runs:
                whole.map(offset, self._physical, first, count)
                offset += count * PAGE_BYTES
            write_image(self._models[model], whole.address)
        except BaseException:
            with self._locked() as cache:
                cache.abandon(model)
            raise
        finally:
            whole.close()
        took_ns = time.monotonic_ns() - started_ns
        with self._locked() as cache:
            cache.written(model, took_ns)
        return took_ns

    @contextlib.contextmanager
    def _locked(self) -> Iterator[HostCache]:
        """The directory, written back at the end. Locks of this kind are a process's, so one thread of each uses a store."""
        fcntl.lockf(self._directory.fd, fcntl.LOCK_EX)
        try:
            cache = _read(self._directory)
            yield cache
            _write(self._directory, cache)
        finally:
            fcntl.lockf(self._directory.fd, fcntl.LOCK_UN)


def _read(region: SharedRegion) -> HostCache:
    length = int.from_bytes(region.bytes[:_LENGTH_BYTES], "little")
    return pickle.loads(region.bytes[_LENGTH_BYTES : _LENGTH_BYTES + length])


def _write(region: SharedRegion, cache: HostCache) -> None:
    data = pickle.dumps(cache, protocol=pickle.HIGHEST_PROTOCOL)
    region.bytes[_LENGTH_BYTES : _LENGTH_BYTES + len(data)] = data
    region.bytes[:_LENGTH_BYTES] = len(data).to_bytes(_LENGTH_BYTES, "little")
