"""Devices that uncoordinated engines share: steps stretched by whatever else runs, and KV for whoever maps it first.

An engine that nobody arbitrates launches when it has work. Its step is a demand for its devices (time alone, bytes, FLOPs:
those of its busiest replica); while several steps are under way, each runs at the rate that serving/cost/contention.py gives it on the device where
it fares worst, because its ranks meet in every layer. Rates change only when a step begins or ends.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from serving.cost.contention import Contention, Load, slowdowns
from serving.cost.hardware import Hardware
from serving.sim.clock import VirtualClock

_DONE_S = 1e-10


@dataclass(eq=False)
class SharedDevice:
    """Free KV pages of a device, whom to tell when some are given back, and how long any step ran on it."""

    hardware: Hardware
    free_pages: int
    busy_s: float = 0.0
    waiting: dict[int, Callable[[], None]] = field(default_factory=dict)
    claims: dict[int, int] = field(default_factory=dict)  # pages that weights wait for, by who does

    def unclaimed(self) -> int:
        """Free pages that no weights wait for."""
        return max(self.free_pages - sum(self.claims.values()), 0) if self.claims else self.free_pages

    def wake(self) -> None:
        """Pages came free: whoever waits looks again."""
        waiting, self.waiting = self.waiting, {}
        for again in waiting.values():
            again()


@dataclass(eq=False, slots=True)
class _Job:
    left_s: float
    load: Load
    devices: Sequence[str]
    then: Callable[[], None]
    rate: float = 1.0


class Crowd:
    """The steps under way on `devices`, by name."""

    def __init__(self, clock: VirtualClock, contention: Contention, dtype: str) -> None:
        self.devices: dict[str, SharedDevice] = {}
        self._clock, self._contention, self._dtype = clock, contention, dtype
        self._jobs: list[_Job] = []
        self._steps_on: dict[str, int] = {}  # devices with any, and how many
        self._crowded = 0  # devices with several
        self._slowed = False  # whether any step is not at its full rate
        self._seen_s = 0.0
        self._plans = 0
        self._ending = False

    def start(self, load: Load, devices: Sequence[str], then: Callable[[], None]) -> None:
        """Begin a step that asks `load` of each of `devices`; `then()` at its end."""
        self._advance()
        self._jobs.append(_Job(load.alone_s, load, devices, then))
        for name in devices:
            steps = self._steps_on[name] = self._steps_on.get(name, 0) + 1
            self._crowded += steps == 2
        if not self._ending:
            self._replan()

    def _leave(self, devices: Sequence[str]) -> None:
        for name in devices:
            steps = self._steps_on[name] = self._steps_on[name] - 1
            self._crowded -= steps == 1
            if not steps:
                del self._steps_on[name]

    def _advance(self) -> None:
        now_s = self._clock.now_ns() / 1e9
        passed_s, self._seen_s = now_s - self._seen_s, now_s
        if not passed_s:
            return
        for job in self._jobs:
            job.left_s -= passed_s * job.rate
        for name in self._steps_on:
            self.devices[name].busy_s += passed_s

    def _replan(self) -> None:
        """Rates from now on, and when the first step will end at them."""
        if self._slowed:
            for job in self._jobs:
                job.rate = 1.0
        self._slowed = self._crowded > 0
        if self._slowed:
            self._slow_down()
        self._plans += 1
        if self._jobs:
            plan, next_s = self._plans, min([max(job.left_s, 0.0) / job.rate for job in self._jobs])
            self._clock.after(next_s, lambda: self._reached(plan))

    def _slow_down(self) -> None:
        """Give steps that share a device the rates that they have there."""
        here: dict[str, list[_Job]] = {}
        for job in self._jobs:
            for name in job.devices:
                if self._steps_on[name] > 1:
                    here.setdefault(name, []).append(job)
        done = set()
        for name, jobs in here.items():
            together = tuple(map(id, jobs))
            if together in done:
                continue  # devices of the same steps give them the same rates
            done.add(together)
            hardware = self.devices[name].hardware
            for job, value in zip(
                jobs, slowdowns([job.load for job in jobs], hardware, self._contention, self._dtype), strict=True
            ):
                job.rate = min(job.rate, 1.0 / value)

    def _reached(self, plan: int) -> None:
        if plan != self._plans:
            return  # something began meanwhile, and there is a newer plan
        self._advance()
        lefts_s = [job.left_s / job.rate for job in self._jobs]
        soonest_s = max(min(lefts_s), 0.0) + _DONE_S
        ended = [job for job, left_s in zip(self._jobs, lefts_s, strict=True) if left_s <= soonest_s]
        for job in ended:
            self._jobs.remove(job)
        for job in ended:
            self._leave(job.devices)
        self._ending = True
        for job in ended:
            job.then()
        self._ending = False
        self._replan()
