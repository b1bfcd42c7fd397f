"""Decode steps taken many at a time: where a device has one lane and nothing but its own clock decides when the next step
begins, and what it is, the pipeline sees one stage as long as all of them.

Nothing of it shows. What each step would have told the host is told, at its own time, before the host looks; and whoever comes in
the middle finds the step that would be under way, and no other after it.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import accumulate

from serving.scheduler import StepPlan

LONGEST_STEPS = 64  # of one leap: what is worked out of its end is lost when somebody comes


@dataclass(slots=True)
class Leap:
    """The decode step `plan`, under way, and those that repeat it, each one token on. `ends_ns` says when each of them ends, `told`
    what each tells the host: (request id, token, whether it was the last). `done` of them are over and were given by `over`."""

    plan: StepPlan
    ends_ns: list[int]
    told: tuple[tuple[int, int, bool], ...]
    done: int = 0

    @classmethod
    def of(cls, plan: StepPlan, now_ns: int, steps_ns: Iterable[int], told: tuple[tuple[int, int, bool], ...]) -> Leap:
        """Of steps that take `steps_ns` each, the first of which is `plan` and begins now."""
        _, *ends_ns = accumulate(steps_ns, initial=now_ns)
        return cls(plan, ends_ns, told)

    @property
    def end_ns(self) -> int:
        return self.ends_ns[-1]

    def over(self, now_ns: int) -> list[int]:
        """When those steps ended that were not given before and are over now; never the last, after which somebody decides."""
        until = bisect_right(self.ends_ns, now_ns, self.done, len(self.ends_ns) - 1)
        ended_ns, self.done = self.ends_ns[self.done : until], until
        return ended_ns

    def cut(self) -> None:
        """Let the step after those that are `done` be the last."""
        del self.ends_ns[self.done + 1 :]
