"""Where a system's workers run: real processes on real devices, or simulated ones on a virtual clock.

A system plans, lays out roles and admits requests the same way on both; only who carries out the roles differs.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from serving.workers.config import Role
from serving.workers.messages import Cancel, PoolUse, Stop, Submit, Tokens
from serving.workers.process import WorkerProcess


class Clock(Protocol):
    """Time as the backend has it."""

    def now_ns(self) -> int: ...

    def sleep(self, seconds: float) -> None: ...

    def wait(self, longest_s: float, poll_s: float) -> None:
        """Let a host that looks for news every `poll_s` wait for its next look, or for `longest_s`."""
        ...


class Worker(Protocol):
    """A worker as its host sees it; see :class:`serving.workers.process.WorkerProcess`."""

    name: str

    def wait_ready(self, deadline_s: float) -> None: ...

    def check(self) -> None: ...

    def send(self, message: Submit | Cancel | Stop) -> None: ...

    def receive(self) -> list[Tokens | PoolUse]: ...

    def read_counters(self) -> dict[str, int]: ...

    def stop(self) -> None: ...


class Backend(Protocol):
    """`name` stands in every record: a simulated number is never shown as measured."""

    name: str
    clock: Clock

    def start_worker(
        self, name: str, core: int | None, role: Role, inherited_fds: Sequence[int], timeline: Path | None
    ) -> Worker: ...


class MonotonicClock:
    """This host's monotonic clock, which workers on it share."""

    def now_ns(self) -> int:
        return time.monotonic_ns()

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds)

    def wait(self, longest_s: float, poll_s: float) -> None:
        time.sleep(min(longest_s, poll_s))


class RealBackend:
    """Worker processes that compute."""

    name = "real"

    def __init__(self) -> None:
        self.clock = MonotonicClock()

    def start_worker(
        self, name: str, core: int | None, role: Role, inherited_fds: Sequence[int], timeline: Path | None
    ) -> WorkerProcess:
        return WorkerProcess(name, core, role, inherited_fds, timeline)
