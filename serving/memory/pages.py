"""Physical pages of one KV pool, lent to runs and given back. Pure bookkeeping: no memory is touched here."""

from __future__ import annotations

import heapq
from contextlib import AbstractContextManager, nullcontext

from serving.errors import CapacityError


class PageLender:
    """Lends page numbers 0 .. `num_pages` - 1, lowest first, so that neighbours in a run tend to be neighbours in memory
    and one mapping call covers several. A page has at most one borrower; double returns are refused."""

    def __init__(self, num_pages: int) -> None:
        self.num_pages = num_pages
        self._free = list(range(num_pages))  # a heap
        self._lent = bytearray(num_pages)

    @property
    def free_pages(self) -> int:
        return len(self._free)

    @property
    def lent_pages(self) -> int:
        return self.num_pages - len(self._free)

    @property
    def unclaimed_pages(self) -> int:
        """Free pages that nobody waits for: all, where there is one borrower."""
        return self.free_pages

    def deciding(self) -> AbstractContextManager[object]:
        """While it lasts nobody else borrows: nobody ever does, where pages are lent within one process."""
        return nullcontext()

    def lend(self, count: int) -> list[int]:
        """`count` free pages, ascending. Raises CapacityError, lending none, when fewer are free."""
        if count > len(self._free):
            raise CapacityError(f"KV pool: {count} pages asked for, {len(self._free)} of {self.num_pages} are free")
        pages = [heapq.heappop(self._free) for _ in range(count)]
        for page in pages:
            self._lent[page] = 1
        return pages

    def give_back(self, pages: list[int]) -> None:
        """Return lent pages. Raises ValueError for a page that is not lent."""
        for page in pages:
            if not self._lent[page]:
                raise ValueError(f"page {page} is not lent")
            self._lent[page] = 0
            heapq.heappush(self._free, page)


def contiguous_runs(pages: list[int]) -> list[tuple[int, int]]:
    """`pages` as (first, count) runs of consecutive numbers, in order."""
    runs: list[tuple[int, int]] = []
    for page in pages:
        if runs and page == runs[-1][0] + runs[-1][1]:
            runs[-1] = (runs[-1][0], runs[-1][1] + 1)
        else:
            runs.append((page, 1))
    return runs
