"""Doorbells: one byte through a pipe tells another process which lane to look at, and wakes it if it sleeps.

Only host-driven control uses them. Lowered control has no doorbell: the two sides poll the mailbox itself.
"""

from __future__ import annotations

import os
import select
from dataclasses import dataclass


@dataclass(frozen=True)
class DoorbellRef:
    """A doorbell's two ends as file descriptors; a process uses one end and inherits it."""

    read_fd: int
    write_fd: int

    @classmethod
    def new(cls) -> DoorbellRef:
        return cls(*os.pipe())

    def close(self) -> None:
        os.close(self.read_fd)
        os.close(self.write_fd)


def ring(fd: int, lane: int) -> None:
    """Say that `lane` has something for whoever reads the other end."""
    os.write(fd, bytes((lane,)))


def answered(fd: int, timeout_s: float) -> bytes:
    """Lanes rung since the last call, waiting up to `timeout_s` for the first; empty when none was."""
    readable, _, _ = select.select([fd], [], [], timeout_s)
    return os.read(fd, 64) if readable else b""
