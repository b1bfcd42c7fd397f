"""Virtual time: a heap of what will happen, and a clock that jumps from one event to the next.

A pipeline of devices keeps events of its own, which would cost too much one by one here (see serving/sim/pipeline.py): it is a
source that the clock asks for the time of its next event and lets run up to the next event of somebody else.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable
from typing import Protocol

_NEVER = 1 << 62
LONGEST_WAIT_S = 0.1  # a host looks at deadlines this often even where nothing happens


class Source(Protocol):
    """Something with events of its own."""

    def next_ns(self) -> int: ...

    def run(self, until_ns: int) -> None:
        """Run its events up to and including `until_ns`; it may end earlier where there is news for the host."""
        ...


class VirtualClock:
    """Events run in order of time, ties in the order in which they were scheduled: the same run, the same order, always."""

    def __init__(self) -> None:
        self._now_ns = 0
        self._events: list[tuple[int, int, Callable[[], None]]] = []
        self._numbers = itertools.count()
        self._sources: list[Source] = []
        self.has_news = False  # something that a host reacts to

    def now_ns(self) -> int:
        return self._now_ns

    def set_ns(self, now_ns: int) -> None:
        """A source has come to `now_ns`."""
        self._now_ns = now_ns

    def attach(self, source: Source) -> None:
        """Run the events of `source` too."""
        self._sources.append(source)

    def after(self, delay_s: float, action: Callable[[], None]) -> None:
        """Run `action` in `delay_s` seconds of virtual time."""
        if delay_s < 0:
            raise ValueError(f"an event {delay_s} s ago cannot be scheduled")
        heapq.heappush(self._events, (self._now_ns + round(delay_s * 1e9), next(self._numbers), action))

    def sleep(self, seconds: float) -> None:
        """Let `seconds` pass: every event due until then runs."""
        self._run_until(self._now_ns + round(seconds * 1e9))

    def wait(self, longest_s: float, poll_s: float) -> None:
        """What a host that looks every `poll_s` would sleep through: until it finds news, or `longest_s` have passed."""
        started_ns, poll_ns = self._now_ns, max(round(poll_s * 1e9), 1)
        until_ns = started_ns + round(min(longest_s, LONGEST_WAIT_S) * 1e9)
        self.has_news = False
        while not self.has_news and self._step(until_ns):
            pass
        if self.has_news:
            looks = -(-(self._now_ns - started_ns) // poll_ns)
            until_ns = min(until_ns, started_ns + max(looks, 1) * poll_ns)
        self._run_until(until_ns)

    def _run_until(self, until_ns: int) -> None:
        self.has_news = False
        while self._step(until_ns):
            self.has_news = False  # a source ends early where there is some
        self._now_ns = until_ns

    def _step(self, until_ns: int) -> bool:
        """Run the next event, or those of a source up to the next event of somebody else. False when none is due."""
        next_ns = self._events[0][0] if self._events else _NEVER
        source, source_ns, bound_ns = None, _NEVER, min(next_ns - 1, until_ns)
        for other in self._sources:
            other_ns = other.next_ns()
            if other_ns < source_ns:
                source, source_ns, bound_ns = other, other_ns, min(bound_ns, source_ns)
            else:
                bound_ns = min(bound_ns, other_ns)
        if source is not None and source_ns < next_ns:
            if source_ns > until_ns:
                return False
            source.run(bound_ns)
            return True
        if next_ns > until_ns:
            return False
        self._now_ns, _, action = heapq.heappop(self._events)
        action()
        return True
