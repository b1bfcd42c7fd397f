"""Virtual time: a heap of what will happen, and a clock that jumps from one event to the next."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable


class VirtualClock:
    """Events run in order of time, ties in the order in which they were scheduled: the same run, the same order, always."""

    def __init__(self) -> None:
        self._now_ns = 0
        self._events: list[tuple[int, int, Callable[[], None]]] = []
        self._numbers = itertools.count()

    def now_ns(self) -> int:
        return self._now_ns

    def after(self, delay_s: float, action: Callable[[], None]) -> None:
        """Run `action` in `delay_s` seconds of virtual time."""
        if delay_s < 0:
            raise ValueError(f"an event {delay_s} s ago cannot be scheduled")
        heapq.heappush(self._events, (self._now_ns + round(delay_s * 1e9), next(self._numbers), action))

    def sleep(self, seconds: float) -> None:
        """Let `seconds` pass: every event due until then runs."""
        until_ns = self._now_ns + round(seconds * 1e9)
        while self._events and self._events[0][0] <= until_ns:
            self._now_ns, _, action = heapq.heappop(self._events)
            action()
        self._now_ns = until_ns
