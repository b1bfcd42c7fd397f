"""Physical pages of one KV pool, lent to runs and given back. Pure bookkeeping: no memory is touched here."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

from serving.errors import CapacityError


class PageLender:
    """Lends page numbers 0 .. `num_pages` - 1, lowest first, so that neighbours in a run tend to be neighbours in memory
    and one mapping call covers several. A page has at most one borrower; double returns are refused. A page that was returned
    by :meth:`keep` is as free as any, lent last, and can be asked for by its number."""

    def __init__(self, num_pages: int) -> None:
        self.num_pages = num_pages
        self._free = list(range(num_pages))  # a heap, of those that are not kept
        self._kept: dict[int, None] = {}  # in the order in which they came back
        self._lent = bytearray(num_pages)

    @property
    def free_pages(self) -> int:
        return len(self._free) + len(self._kept)

    @property
    def lent_pages(self) -> int:
        return self.num_pages - self.free_pages

    @property
    def unclaimed_pages(self) -> int:
        """Free pages that nobody waits for: all, where there is one borrower."""
        return self.free_pages

    def deciding(self) -> AbstractContextManager[object]:
        """While it lasts nobody else borrows: nobody ever does, where pages are lent within one process."""
        return nullcontext()

    def require(self, count: int) -> None:
        """Raises CapacityError when fewer than `count` pages are free."""
        if count > self.free_pages:
            raise CapacityError(f"KV pool: {count} pages asked for, {self.free_pages} of {self.num_pages} are free")

    def lend(self, count: int) -> list[int]:
        """`count` free pages, ascending but for kept ones, which come last. Raises CapacityError, lending none, when fewer are
        free."""
        self.require(count)
        pages = [heapq.heappop(self._free) for _ in range(min(count, len(self._free)))]
        while len(pages) < count:
            pages.append(next(iter(self._kept)))
            del self._kept[pages[-1]]
        for page in pages:
            self._lent[page] = 1
        return pages

    def take(self, pages: Sequence[int]) -> bool:
        """Lend `pages`, which were kept, if all of them still are; else none."""
        if any(page not in self._kept for page in pages):
            return False
        for page in pages:
            del self._kept[page]
            self._lent[page] = 1
        return True

    def give_back(self, pages: Sequence[int]) -> None:
        """Return lent pages. Raises ValueError for a page that is not lent."""
        for page in pages:
            self._return(page)
            heapq.heappush(self._free, page)

    def keep(self, pages: Sequence[int]) -> None:
        """Return lent pages that one would rather have again. Raises ValueError for a page that is not lent."""
        for page in pages:
            self._return(page)
            self._kept[page] = None

    def forget(self, pages: Sequence[int]) -> None:
        """Let those of `pages` that are kept be free like others."""
        for page in pages:
            if page in self._kept:
                del self._kept[page]
                heapq.heappush(self._free, page)

    def _return(self, page: int) -> None:
        if not self._lent[page]:
            raise ValueError(f"page {page} is not lent")
        self._lent[page] = 0


def contiguous_runs(pages: list[int]) -> list[tuple[int, int]]:
    """`pages` as (first, count) runs of consecutive numbers, in order."""
    runs: list[tuple[int, int]] = []
    for page in pages:
        if runs and page == runs[-1][0] + runs[-1][1]:
            runs[-1] = (runs[-1][0], runs[-1][1] + 1)
        else:
            runs.append((page, 1))
    return runs
