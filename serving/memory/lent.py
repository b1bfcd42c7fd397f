"""One device's memory shared by engines that are processes of their own: a ledger and a page table that all of them map.

Nobody arbitrates: whoever takes a page first has it. The table of owners is the only truth, everything else is counted from
it, and a record lock of the operating system guards it, which ends with its holder; so an engine that is killed at any
moment, even while it decides, leaves the table whole and nobody waiting.
"""

from __future__ import annotations

import fcntl
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

from serving.errors import CapacityError
from serving.memory.budget import format_bytes
from serving.memory.virtual import HostMemory, PhysicalPages
from serving.shm.region import CACHE_LINE_BYTES, SharedRegion

_OWNER = np.dtype(np.int16)


@dataclass(frozen=True)
class LentShape:
    """`num_pages` pages lent to `engines` engines of a device of `capacity_bytes`."""

    num_pages: int
    engines: int
    capacity_bytes: int

    @property
    def _table_at(self) -> int:
        return -(-16 * self.engines // CACHE_LINE_BYTES) * CACHE_LINE_BYTES

    @property
    def region_bytes(self) -> int:
        return self._table_at + self.num_pages * _OWNER.itemsize

    def views(self, region: SharedRegion) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """By engine [engines] int64 the bytes charged and the pages claimed, and the owner of each page plus one [num_pages]
        int16 (0: free)."""
        charged, claimed = (np.frombuffer(region.bytes, np.int64, self.engines, 8 * self.engines * at) for at in (0, 1))
        return charged, claimed, np.frombuffer(region.bytes, _OWNER, self.num_pages, self._table_at)


class _Shared:
    """What both parts have: one engine's view of the region, and the lock over it."""

    def __init__(self, region: SharedRegion, shape: LentShape, engine: int) -> None:
        self._region, self._shape, self._engine = region, shape, engine
        self._charged, self._claimed, self._owners = shape.views(region)
        self._depth = 0

    @contextmanager
    def deciding(self) -> Iterator[None]:
        """While it lasts no other process takes or returns anything. May be nested."""
        if not self._depth:
            fcntl.lockf(self._region.fd, fcntl.LOCK_EX)
        self._depth += 1
        try:
            yield
        finally:
            self._depth -= 1
            if not self._depth:
                fcntl.lockf(self._region.fd, fcntl.LOCK_UN)


class SharedBudget(_Shared):
    """A :class:`serving.memory.budget.MemoryBudget` whose capacity engines share; each charges what it holds."""

    def charge(self, purpose: str, count_bytes: int) -> None:
        """Take `count_bytes` for `purpose`. Raises CapacityError where the device, with all its engines, has fewer left."""
        with self.deciding():
            free_bytes = self._shape.capacity_bytes - int(self._charged.sum())
            if count_bytes > free_bytes:
                missing = count_bytes - free_bytes
                raise CapacityError(
                    f"{purpose} needs {count_bytes} bytes but {free_bytes} of {self._shape.capacity_bytes} are free on its "
                    f"device; {missing} bytes ({format_bytes(missing)}) are missing"
                )
            self._charged[self._engine] += count_bytes


class SharedPageLender(_Shared):
    """A :class:`serving.memory.pages.PageLender` over pages that other engines borrow too. What one keeps is free to all; only
    it prefers others to them, and each begins to look where no other does."""

    def __init__(self, region: SharedRegion, shape: LentShape, engine: int) -> None:
        super().__init__(region, shape, engine)
        self._kept = np.zeros(shape.num_pages, bool)
        self._first = engine * shape.num_pages // shape.engines

    @property
    def num_pages(self) -> int:
        return self._shape.num_pages

    @property
    def free_pages(self) -> int:
        """Of everyone; may change at once unless it is read within `deciding`."""
        return self.num_pages - int(np.count_nonzero(self._owners))

    @property
    def unclaimed_pages(self) -> int:
        """Free pages that no other engine waits for."""
        others = int(self._claimed.sum() - self._claimed[self._engine])
        return max(self.free_pages - others, 0)

    def claim(self, count: int) -> None:
        """Wait for `count` pages at once (0: no longer): what comes free meanwhile is not `unclaimed` to others."""
        with self.deciding():
            self._claimed[self._engine] = count

    @property
    def lent_pages(self) -> int:
        """Pages that this engine has."""
        return int(np.count_nonzero(self._owners == self._engine + 1))

    def require(self, count: int) -> None:
        """Raises CapacityError when fewer than `count` pages are free."""
        if count > self.free_pages:
            raise CapacityError(f"KV pages: {count} asked for, {self.free_pages} of {self.num_pages} are free")

    def lend(self, count: int) -> list[int]:
        """`count` free pages, from this engine's first place upwards and around, kept ones last. Raises CapacityError, lending
        none, when fewer are free."""
        with self.deciding():
            self.require(count)
            free = np.flatnonzero(self._owners == 0)
            free = np.roll(free, -int(np.searchsorted(free, self._first)))
            kept = self._kept[free]
            pages = np.concatenate((free[~kept], free[kept]))[:count]
            self._owners[pages] = self._engine + 1
            self._kept[pages] = False
        return pages.tolist()

    def take(self, pages: Sequence[int]) -> bool:
        """Lend `pages`, which were kept, if nobody has one of them; else none."""
        with self.deciding():
            if np.any(self._owners[pages]):
                return False
            self._owners[pages] = self._engine + 1
            self._kept[pages] = False
        return True

    def give_back(self, pages: Sequence[int]) -> None:
        """Return lent pages, unmapped before. Raises ValueError, returning none, for a page that this engine has not."""
        with self.deciding():
            foreign = [page for page in pages if self._owners[page] != self._engine + 1]
            if foreign:
                raise ValueError(f"pages {foreign} are not lent to this engine")
            self._owners[pages] = 0

    def keep(self, pages: Sequence[int]) -> None:
        """Return lent pages, as :meth:`give_back` does, that one would rather have again."""
        self.give_back(pages)
        self._kept[pages] = True

    def forget(self, pages: Sequence[int]) -> None:
        """Prefer others to `pages` no longer."""
        self._kept[pages] = False


class LentMemory(HostMemory):
    """Physical pages that another process made: the memory file `fd`, mapped where this one needs it."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def pages(self, num_pages: int, page_bytes: int) -> PhysicalPages:
        return PhysicalPages(num_pages, page_bytes, self._fd)
