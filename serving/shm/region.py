"""A region of memory that several processes map. It has no name, so nothing is left behind when they die."""

from __future__ import annotations

import mmap
import os

from serving.errors import CapacityError

CACHE_LINE_BYTES = 64


class SharedRegion:
    """`size_bytes` of anonymous shared memory, made here or attached from an inherited file descriptor."""

    def __init__(self, size_bytes: int, fd: int | None = None) -> None:
        self.size_bytes = size_bytes
        if fd is None:
            fd = os.memfd_create("crosspool", os.MFD_CLOEXEC)
            try:
                os.posix_fallocate(fd, 0, size_bytes)
            except OSError as error:
                os.close(fd)
                raise CapacityError(f"shared region of {size_bytes} bytes cannot be had: {error.strerror}") from None
        self.fd = fd
        self.map = mmap.mmap(fd, size_bytes, flags=mmap.MAP_SHARED | getattr(mmap, "MAP_POPULATE", 0))
        self.bytes = memoryview(self.map)

    def words(self, offset_bytes: int, count: int) -> memoryview:
        """`count` signed 64-bit words at `offset_bytes`: reads and writes of one are atomic."""
        return self.bytes[offset_bytes : offset_bytes + 8 * count].cast("q")

    def close(self) -> None:
        """Unmap where no tensor or view still looks into the region, and close the descriptor in any case."""
        if self.fd < 0:
            return
        os.close(self.fd)
        self.fd = -1
        try:
            self.bytes.release()
            self.map.close()
        except BufferError:
            pass  # a view is alive; the mapping goes when the last one does
