"""Devices that uncoordinated engines share: steps stretched by whatever else runs, and KV for whoever maps it first.

An engine that nobody arbitrates launches when it has work. Its step is a demand for its devices (time alone, bytes, FLOPs:
those of its busiest replica); while several steps are under way, each runs at the rate that serving/cost/contention.py gives it on the device where
it fares worst, because its ranks meet in every layer. Steps on the same device share it; those on other cores of a host, whose
memory they share, slow each other by what each draws. Rates change only when a step begins or ends.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from serving.cost.contention import Contention, Load, neighbour_slowdown, slowdowns
from serving.cost.hardware import Hardware
from serving.sim.clock import VirtualClock

_DONE_S = 1e-10


@dataclass(eq=False)
class SharedDevice:
    """Free KV pages of a device, whom to tell when some are given back, and how long any step ran on it. `memory` numbers what it
    draws on: a card's own, or that of all cores of a host."""

    hardware: Hardware
    free_pages: int
    memory: int = 0
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
        self._minding = 0  # steps that mind who draws on their memory from other devices
        self._slowed = False  # whether any step is not at its full rate
        self._seen_s = 0.0
        self._plans = 0
        self._ending = False

    def start(self, load: Load, devices: Sequence[str], then: Callable[[], None], factor: float = 1) -> None:
        """Begin a step that asks `load` of each of `devices` and takes `factor` times as long as its like; `then()` at its end."""
        self._advance()
        self._jobs.append(_Job(load.alone_s * factor, load, devices, then))
        self._minding += load.beside_stream > 1.0
        for name in devices:
            steps = self._steps_on[name] = self._steps_on.get(name, 0) + 1
            self._crowded += steps == 2
        if not self._ending:
            self._replan()

    def _leave(self, job: _Job) -> None:
        self._minding -= job.load.beside_stream > 1.0
        for name in job.devices:
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
        self._slowed = self._crowded > 0 or (self._minding > 0 and len(self._steps_on) > 1)
        if self._slowed:
            self._slow_down()
        self._plans += 1
        if self._jobs:
            plan, next_s = self._plans, min([max(job.left_s, 0.0) / job.rate for job in self._jobs])
            self._clock.after(next_s, lambda: self._reached(plan))

    def _slow_down(self) -> None:
        """Give steps that share a device, or memory, the rates that they have there."""
        here: dict[str, list[_Job]] = {}
        for job in self._jobs:
            for name in job.devices:
                if self._minding or self._steps_on[name] > 1:
                    here.setdefault(name, []).append(job)
        done = set()
        for name, jobs in here.items():
            beside = self._beside(name, here) if self._minding else ()
            together = (*map(id, jobs), beside)
            if together in done:
                continue  # devices of the same steps, beside the same ones, give them the same rates
            done.add(together)
            hardware = self.devices[name].hardware
            loads = [job.load for job in jobs]
            for job, value in zip(jobs, slowdowns(loads, hardware, self._contention, self._dtype), strict=True):
                if beside:
                    value *= neighbour_slowdown(job.load.beside_stream, beside, hardware)
                job.rate = min(job.rate, 1.0 / value)

    def _beside(self, name: str, here: dict[str, list[_Job]]) -> tuple[Load, ...]:
        """What other devices ask of the memory of device `name`: one that several steps share does one after the other."""
        memory = self.devices[name].memory
        return tuple(
            Load(
                sum(job.load.alone_s for job in jobs),
                sum(job.load.bytes for job in jobs),
                sum(job.load.flops for job in jobs),
            )
            for other, jobs in here.items()
            if other != name and self.devices[other].memory == memory
        )

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
            self._leave(job)
        self._ending = True
        for job in ended:
            job.then()
        self._ending = False
        self._replan()
