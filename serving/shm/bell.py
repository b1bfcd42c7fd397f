"""A bell between processes: whoever has nothing to do sleeps until it rings. A counter of the kernel's (`eventfd`)."""

from __future__ import annotations

import os
import select


class Bell:
    """Made here, or attached from an inherited file descriptor. A ring is heard once, by whoever waits next, so that none
    between looking for work and going to sleep is missed."""

    def __init__(self, fd: int | None = None) -> None:
        self.fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK) if fd is None else fd

    def ring(self) -> None:
        """Wake whoever waits; does not wait itself."""
        os.eventfd_write(self.fd, 1)

    def wait(self, longest_s: float) -> None:
        """Sleep until the bell has rung since the last call, at most `longest_s`."""
        if select.select([self.fd], [], [], longest_s)[0]:
            os.eventfd_read(self.fd)

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1
