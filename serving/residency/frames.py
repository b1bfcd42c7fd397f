"""Which pages of a device's arena an image gets. Pure bookkeeping: no memory is touched here.

Memory comes in frames of many pages, and a frame that stays whole moves at the cost of one entry of a page table. So an image
takes whole frames as long as there are any, and what is left of it takes pages of frames that others have broken. Pages are
named by runs, as models have thousands and whoever counts them one by one holds up those that compute.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from serving.errors import CapacityError

Run = tuple[int, int]  # first page and count


class FrameLender:
    """Lends pages 0 .. `num_pages` - 1, of which `per_frame` in a row are a frame. A page has at most one borrower."""

    def __init__(self, num_pages: int, per_frame: int) -> None:
        self.num_pages, self._per_frame = num_pages, per_frame
        self._lent = bytearray(num_pages)
        self._free_of = [min(per_frame, num_pages - first) for first in range(0, num_pages, per_frame)]
        self.free_pages = num_pages

    def lend(self, count: int) -> list[Run]:
        """`count` pages as runs: whole frames first, then loose pages, of broken frames where they suffice. Raises CapacityError,
        lending none, when fewer are free."""
        if count > self.free_pages:
            raise CapacityError(f"arena: {count} pages asked for, {self.free_pages} of {self.num_pages} are free")
        runs: list[Run] = []
        broken, left = [], []
        missing = count
        for frame, free in enumerate(self._free_of):
            if free < self._per_frame:
                broken.append(frame)
            elif missing >= self._per_frame:
                runs.append((frame * self._per_frame, self._per_frame))
                missing -= self._per_frame
            else:
                left.append(frame)
        for frame in broken + left:
            if not missing:
                break
            for page in self._free_pages_of(frame)[:missing]:
                runs.append((page, 1))
                missing -= 1
        runs = joined(runs)
        for first, length in runs:
            self._mark(first, length, True)
        return runs

    def give_back(self, runs: Sequence[Run]) -> None:
        """Return lent pages. Raises ValueError for pages that are not all lent."""
        for first, length in runs:
            if self._lent[first : first + length] != b"\1" * length:
                raise ValueError(f"pages {first} to {first + length - 1} are not all lent")
            self._mark(first, length, False)

    def _free_pages_of(self, frame: int) -> list[int]:
        first = frame * self._per_frame
        return [page for page in range(first, min(first + self._per_frame, self.num_pages)) if not self._lent[page]]

    def _mark(self, first: int, length: int, lent: bool) -> None:
        self._lent[first : first + length] = bytes([lent]) * length
        change = -1 if lent else 1
        self.free_pages += change * length
        end = first + length
        for frame in range(first // self._per_frame, (end - 1) // self._per_frame + 1):
            begins = frame * self._per_frame
            self._free_of[frame] += change * (min(end, begins + self._per_frame) - max(first, begins))


def joined(runs: Iterable[Run]) -> list[Run]:
    """`runs` in their order, those that follow one another made one."""
    result: list[Run] = []
    for first, count in runs:
        if result and first == sum(result[-1]):
            result[-1] = (result[-1][0], result[-1][1] + count)
        else:
            result.append((first, count))
    return result


def total(runs: Iterable[Run]) -> int:
    """Pages in `runs`."""
    return sum(count for _, count in runs)
