"""Memory that is there from the start, as an accelerator's is, and moves between addresses without being copied or cleared.

Private pages, touched once and from then on held, in frames of 2 MiB where the system gives them. Moving a whole frame is one
entry of a page table (0.1 ms for 420 MiB in a row, against 57 ms for mapping as much of a memory file), and a copy into
frames that are there runs at the memory's speed. Linux 5.7 or newer (`mremap` with MREMAP_DONTUNMAP).
"""

from __future__ import annotations

import ctypes
import errno
import os

from serving.errors import CapacityError, UserError
from serving.memory.virtual import FRAME_BYTES, VirtualRange, advise

_MAYMOVE, _FIXED, _DONTUNMAP = 1, 2, 4
_ADVICE_POPULATE_WRITE = 23

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mremap.restype = ctypes.c_void_p
_libc.mremap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t, ctypes.c_int, ctypes.c_void_p]
_FAILED = ctypes.c_void_p(-1).value


class MovableMemory:
    """`num_pages` pages of `page_bytes`, at home here until they are lent to another range of addresses of this process."""

    def __init__(self, num_pages: int, page_bytes: int) -> None:
        """Raises CapacityError where so much memory cannot be had."""
        self.num_pages, self.page_bytes = num_pages, page_bytes
        length = num_pages * page_bytes
        self._home = VirtualRange(length, align_bytes=FRAME_BYTES)
        self._home.open()
        code = advise(self._home.address, length, _ADVICE_POPULATE_WRITE)
        if code == errno.EINVAL:  # before Linux 5.14
            ctypes.memset(self._home.address, 0, length)
        elif code:
            raise CapacityError(f"an arena of {length} bytes cannot be had: {os.strerror(code)}")

    def lend(self, first_page: int, count: int, address: int) -> None:
        """Move `count` pages to `address`, as they are; what was mapped there is gone."""
        self._move(self._home.address + first_page * self.page_bytes, address, count)

    def take_back(self, first_page: int, count: int, address: int) -> None:
        """Move `count` pages home from `address`, which is left without memory."""
        self._move(address, self._home.address + first_page * self.page_bytes, count)

    def close(self) -> None:
        """Give the memory back: of what is lent, its borrower's range does."""
        self._home.close()

    def _move(self, source: int, target: int, count: int) -> None:
        length = count * self.page_bytes
        moved = _libc.mremap(source, length, length, _MAYMOVE | _FIXED | _DONTUNMAP, target)
        if moved != _FAILED:
            return
        code = ctypes.get_errno()
        if code == errno.EFAULT and count > 1:  # some kernels move only what was mapped in one piece
            half = count // 2
            self._move(source, target, half)
            self._move(source + half * self.page_bytes, target + half * self.page_bytes, count - half)
            return
        if code == errno.EINVAL:
            raise UserError("swap's arena moves pages with mremap and MREMAP_DONTUNMAP, which Linux 5.7 or newer has")
        raise CapacityError(f"moving {length} bytes of an arena failed: {os.strerror(code)} (see vm.max_map_count)")
