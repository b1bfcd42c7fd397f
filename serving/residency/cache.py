"""Whose images are in the host cache, and who makes room for whom. Pure state: the real store keeps it in shared memory, the
simulator as it is."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from serving.residency.eviction import Candidate, eviction_order
from serving.residency.frames import Run, joined, total


@dataclass
class Entry:
    """An image in the cache, being written to it, or promised to it."""

    runs: list[Run]  # its pages
    ready: bool = False
    promised: bool = False  # nobody has begun to write it yet
    pins: int = 0
    used_ns: int = 0
    read_ns: int = 0  # what reading its checkpoint took


class HostCache:
    """`num_pages` pages, and the images in them by model number. What is pinned stays."""

    def __init__(self, num_pages: int, eviction: str) -> None:
        self._free: list[Run] = [(0, num_pages)]  # ascending
        self._eviction = eviction
        self._entries: dict[int, Entry] = {}

    def __contains__(self, model: int) -> bool:
        return model in self._entries

    @property
    def free_pages(self) -> int:
        return total(self._free)

    def held(self) -> set[int]:
        """Models whose images are there."""
        return {model for model, entry in self._entries.items() if entry.ready}

    def pin(self, model: int, now_ns: int) -> list[Run] | None:
        """The pages of the image of `model`, which stays until :meth:`unpin`; None where it is not there."""
        entry = self._entries.get(model)
        if entry is None or not entry.ready:
            return None
        entry.pins += 1
        entry.used_ns = now_ns
        return entry.runs

    def unpin(self, model: int) -> None:
        self._entries[model].pins -= 1

    def reserve(self, model: int, needed_pages: int, now_ns: int) -> list[Run] | None:
        """Pinned pages for an image to be written, others having left for it if need be; None, changing nothing, where it is
        being written already or those in use leave too few."""
        if model in self._entries or not self._make_room(needed_pages, now_ns):
            return None
        runs, missing = [], needed_pages
        while missing:
            first, count = self._free.pop(0)
            taken = min(count, missing)
            runs.append((first, taken))
            missing -= taken
            if taken < count:
                self._free.insert(0, (first + taken, count - taken))
        self._entries[model] = Entry(runs, pins=1, used_ns=now_ns)
        return runs

    def promise(self, model: int, needed_pages: int) -> bool:
        """Keep pages for an image that somebody will :meth:`claim` and write: until then it is as one that is being written.
        False, changing nothing, where it is there or the free pages are too few; nobody leaves for a promise."""
        if needed_pages > self.free_pages or self.reserve(model, needed_pages, 0) is None:
            return False
        self._entries[model].promised = True
        return True

    def claim(self, model: int) -> list[Run] | None:
        """The pinned pages of an image that was promised and that the caller now writes; None where there is none to write."""
        entry = self._entries.get(model)
        if entry is None or not entry.promised:
            return None
        entry.promised = False
        return entry.runs

    def written(self, model: int, took_ns: int) -> None:
        """The image is there, after so long."""
        entry = self._entries[model]
        entry.ready, entry.read_ns = True, took_ns

    def abandon(self, model: int) -> None:
        """The image that was to be written will not be."""
        self._free_pages_of([model])

    def _make_room(self, needed: int, now_ns: int) -> bool:
        idle = [
            Candidate(number, total(entry.runs), entry.used_ns, entry.read_ns)
            for number, entry in self._entries.items()
            if entry.ready and not entry.pins
        ]
        missing = needed - total(self._free)
        if sum(one.pages for one in idle) < missing:
            return False
        leaving = []
        for one in eviction_order(idle, self._eviction, now_ns):
            if missing <= 0:
                break
            leaving.append(one.key)
            missing -= one.pages
        self._free_pages_of(leaving)
        return True

    def _free_pages_of(self, models: Iterable[int]) -> None:
        for model in models:
            self._free += self._entries.pop(model).runs
        self._free = joined(sorted(self._free))
