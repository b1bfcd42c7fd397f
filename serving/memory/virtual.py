"""Address space without memory, and memory mapped into it: the CPU's form of CUDA's virtual memory driver calls.

A :class:`PhysicalPages` is one anonymous memory file; a :class:`VirtualRange` is address space reserved without access.
Mapping puts pages of the file at a fixed address of the range, so a tensor over the range sees them where it expects
them; unmapping takes the access away again. Linux only (`memfd_create`, `mmap` with MAP_FIXED).
"""

from __future__ import annotations

import ctypes
import mmap
import os
from typing import Any, Protocol

import torch

from serving.errors import CapacityError, UserError

FRAME_BYTES = 2 << 20  # a huge page

_PROT_NONE, _PROT_READ_WRITE = 0, mmap.PROT_READ | mmap.PROT_WRITE
_MAP_SHARED, _MAP_PRIVATE, _MAP_FIXED, _MAP_ANONYMOUS = 0x01, 0x02, 0x10, 0x20
_MAP_NORESERVE, _MAP_POPULATE = 0x4000, 0x8000
_ADVICE_HUGEPAGE = 14
_MAP_FAILED = ctypes.c_void_p(-1).value

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


def advise(address: int, length: int, advice: int) -> int:
    """`madvise` over a range: 0, or the number of the error."""
    return ctypes.get_errno() if length and _libc.madvise(address, length, advice) else 0


def _mmap(address: int | None, length: int, protection: int, flags: int, fd: int = -1, offset: int = 0) -> int:
    mapped = _libc.mmap(address, length, protection, flags, fd, offset)
    if mapped == _MAP_FAILED:
        reason = os.strerror(ctypes.get_errno())
        raise CapacityError(
            f"mapping {length} bytes of KV memory failed: {reason} (see vm.max_map_count, vm.overcommit_memory)"
        )
    return mapped


class PhysicalPages:
    """`num_pages` pages of memory, committed and touched at once: a later mapping cannot fail for want of it, and costs 5 us
    a 64 KiB page rather than the 200 us of a first touch (measured). With `fd` they are those that another process made."""

    def __init__(self, num_pages: int, page_bytes: int, fd: int | None = None) -> None:
        if page_bytes <= 0 or page_bytes % mmap.PAGESIZE:
            raise UserError(f"KV page of {page_bytes} bytes is not a multiple of the system's {mmap.PAGESIZE}")
        self.num_pages = self.most_kept = num_pages  # a free page that stays mapped costs nothing
        self.page_bytes = page_bytes
        if fd is not None:
            self._fd = fd
            return
        self._fd = os.memfd_create("kv-pool", os.MFD_CLOEXEC)
        try:
            if num_pages:
                os.posix_fallocate(self._fd, 0, num_pages * page_bytes)
                length = num_pages * page_bytes
                _libc.munmap(_mmap(None, length, _PROT_READ_WRITE, _MAP_SHARED | _MAP_POPULATE, self._fd), length)
        except OSError as error:
            os.close(self._fd)
            raise CapacityError(f"KV pool of {num_pages * page_bytes} bytes cannot be had: {error.strerror}") from None

    @property
    def fd(self) -> int:
        return self._fd

    def let_go(self, pages: list[int]) -> None:
        """Nothing of this process maps `pages` any more. They stay in the file."""

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


class VirtualRange:
    """`length_bytes` of reserved address space that pages are mapped into. Offsets are multiples of the page size."""

    def __init__(self, length_bytes: int, align_bytes: int = mmap.PAGESIZE) -> None:
        """At an address that is a multiple of `align_bytes`."""
        self.length_bytes = length_bytes
        flags = _MAP_PRIVATE | _MAP_ANONYMOUS | _MAP_NORESERVE
        self._reserved_bytes = length_bytes + align_bytes - mmap.PAGESIZE
        self._reserved = _mmap(None, self._reserved_bytes, _PROT_NONE, flags)
        self._address = -(-self._reserved // align_bytes) * align_bytes

    @property
    def address(self) -> int:
        return self._address

    def map(self, offset_bytes: int, physical: PhysicalPages, first_page: int, count: int) -> None:
        """Put `count` consecutive physical pages at `offset_bytes`, faulted in so that first use costs nothing."""
        flags = _MAP_SHARED | _MAP_FIXED | _MAP_POPULATE
        length = count * physical.page_bytes
        _mmap(
            self._address + offset_bytes, length, _PROT_READ_WRITE, flags, physical.fd, first_page * physical.page_bytes
        )

    def open(self) -> None:
        """Memory of this process alone under the whole range, which comes as it is touched: in frames of FRAME_BYTES where the
        system gives them and the range holds them whole, in pages of its own elsewhere."""
        flags = _MAP_PRIVATE | _MAP_ANONYMOUS | _MAP_NORESERVE | _MAP_FIXED
        _mmap(self._address, self.length_bytes, _PROT_READ_WRITE, flags)
        advise(self._address, self.length_bytes, _ADVICE_HUGEPAGE)  # refused where the kernel has none

    def unmap(self, offset_bytes: int, length_bytes: int) -> None:
        """Take the pages in [offset, offset + length) away; touching them afterwards is a fault, not stale data."""
        flags = _MAP_PRIVATE | _MAP_ANONYMOUS | _MAP_NORESERVE | _MAP_FIXED
        _mmap(self._address + offset_bytes, length_bytes, _PROT_NONE, flags)

    def tensor(self, offset_bytes: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """A tensor over [offset, ...) of the range, mapped or not. It must not outlive the range."""
        count = 1
        for size in shape:
            count *= size
        length = count * dtype.itemsize
        if offset_bytes + length > self.length_bytes:
            raise ValueError("tensor exceeds the virtual range")
        buffer = (ctypes.c_char * length).from_address(self._address + offset_bytes)
        return torch.frombuffer(buffer, dtype=dtype).view(shape)

    def close(self) -> None:
        """Release the address space. Tensors over it must be gone."""
        if self._address:
            _libc.munmap(self._reserved, self._reserved_bytes)
            self._address = 0


class Memory(Protocol):
    """Where a KV pool gets physical pages and address space from; both have the methods of the classes above. Where it is
    `anchored`, a tensor's first bytes must be mapped, whatever is read of it."""

    anchored: bool

    def pages(self, num_pages: int, page_bytes: int) -> Any: ...

    def reserve(self, length_bytes: int) -> Any: ...


class HostMemory:
    """This process's own memory."""

    anchored = False

    def pages(self, num_pages: int, page_bytes: int) -> PhysicalPages:
        return PhysicalPages(num_pages, page_bytes)

    def reserve(self, length_bytes: int) -> VirtualRange:
        return VirtualRange(length_bytes)


HOST_MEMORY = HostMemory()
