"""A ring of messages from one writer to one reader, in shared memory: control to a worker, tokens back to the host."""

from __future__ import annotations

import struct

from serving.shm.bell import Bell
from serving.shm.region import CACHE_LINE_BYTES, SharedRegion

_LENGTH = struct.Struct("<I")
_HEADER_BYTES = 2 * CACHE_LINE_BYTES  # the writer's and the reader's position, a cache line each


class Ring:
    """Single producer, single consumer, bytes in and bytes out. Positions only grow; `region` holds header and data."""

    def __init__(self, region: SharedRegion) -> None:
        self._written = region.words(0, 1)
        self._read = region.words(CACHE_LINE_BYTES, 1)
        self._data = region.bytes[_HEADER_BYTES:]
        self._capacity = len(self._data)

    def push(self, message: bytes) -> bool:
        """Append `message`; False when there is no room for it now. Raises ValueError if there never will be."""
        need = _LENGTH.size + len(message)
        if need > self._capacity:
            raise ValueError(f"message of {len(message)} bytes exceeds the ring's {self._capacity}")
        written = self._written[0]
        if written + need - self._read[0] > self._capacity:
            return False
        self._copy_in(written, _LENGTH.pack(len(message)))
        self._copy_in(written + _LENGTH.size, message)
        self._written[0] = written + need
        return True

    def pop(self) -> bytes | None:
        """The oldest message, or None when there is none."""
        read = self._read[0]
        if read == self._written[0]:
            return None
        (length,) = _LENGTH.unpack(self._copy_out(read, _LENGTH.size))
        message = self._copy_out(read + _LENGTH.size, length)
        self._read[0] = read + _LENGTH.size + length
        return message

    @property
    def empty(self) -> bool:
        return self._read[0] == self._written[0]

    def release(self) -> None:
        """Let go of the region's memory."""
        for view in (self._written, self._read, self._data):
            view.release()

    def _copy_in(self, position: int, message: bytes) -> None:
        start = position % self._capacity
        first = min(len(message), self._capacity - start)
        self._data[start : start + first] = message[:first]
        self._data[: len(message) - first] = message[first:]

    def _copy_out(self, position: int, length: int) -> bytes:
        start = position % self._capacity
        first = min(length, self._capacity - start)
        return bytes(self._data[start : start + first]) + bytes(self._data[: length - first])


class BelledRing(Ring):
    """A ring whose reader may sleep until there is something to read: the writer rings `bell` after every message."""

    def __init__(self, region: SharedRegion, bell: Bell) -> None:
        super().__init__(region)
        self._bell = bell

    def push(self, message: bytes) -> bool:
        """As :meth:`Ring.push`."""
        pushed = super().push(message)
        if pushed:
            self._bell.ring()
        return pushed

    def wait(self, longest_s: float) -> None:
        """Sleep until there may be a message, at most `longest_s`; not at all where there is one."""
        if self.empty:
            self._bell.wait(longest_s)
