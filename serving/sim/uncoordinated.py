"""A group whose engine nobody arbitrates: it steps when it has work, maps pages while there are any, and preempts its youngest."""

from __future__ import annotations

from collections.abc import Sequence

from serving.batching import StepLimits
from serving.cost.contention import Load
from serving.growth import Claim, grow_or_preempt
from serving.idle import IdleWeights
from serving.parallel.costs import GroupCosts, StepShape
from serving.sim.clock import VirtualClock
from serving.sim.costs import drawn_factor
from serving.sim.groups import SimulatedGroup
from serving.sim.idle_weights import SimulatedWeights
from serving.sim.shared import Crowd, SharedDevice
from serving.workers.config import GroupSeat

_LATER_S = 1e-6  # than weights are due to leave, so that rounding does not make it too soon


class UncoordinatedGroup(SimulatedGroup):
    """One engine of several on the devices of `crowd`."""

    def __init__(
        self,
        seat: GroupSeat,
        costs: GroupCosts,
        limits: StepLimits,
        clock: VirtualClock,
        crowd: Crowd,
        prefill: bool = True,
        optimistic: bool = False,
        evict_idle_s: float = 0.0,
        page_bytes: int = 0,
        kind: str = "",
    ) -> None:
        """Weights leave after `evict_idle_s` without work (0: they stay); then KV comes in pages of `page_bytes`, and devices are
        of `kind`."""
        super().__init__(seat, costs, limits, clock, prefill)
        self._crowd = crowd
        self._idle: IdleWeights | None = None
        self._looks_again = False
        if evict_idle_s:
            device = crowd.devices[self._plan.devices[0]]
            weights = SimulatedWeights(seat.model, device, kind, page_bytes, clock, self._again, self._count)
            self._idle = IdleWeights(evict_idle_s, weights)
            clock.after(0.0, self._again)
        self._most_running = limits.max_batch if optimistic else None

    def _begin(self) -> None:
        if self._idle is not None and not self._weights_there():
            return
        may_step = [self._reserve(replica) for replica in range(self._plan.dp)]
        plans = [
            scheduler.next_step(lambda sequence, granted=granted: sequence.request_id in granted)
            for scheduler, granted in zip(self._schedulers, may_step, strict=True)
        ]
        waits = any(scheduler.live for scheduler in self._schedulers) and not any(plans)
        for device in self._devices(range(self._plan.ranks)):
            if waits:
                device.waiting[id(self)] = self._again
            else:
                device.waiting.pop(id(self), None)
        if not any(plans):
            return
        self._start(plans)

    def _demand(self, shapes: Sequence[StepShape], wanted: Sequence[int]) -> Load:
        return self._costs.step_load(shapes)

    def _compute(self, demand: Load) -> None:
        self._crowd.start(demand, self._plan.devices, self._complete, drawn_factor(self._costs.spread, self._random))

    def _release(self, replica: int, request_id: int) -> None:
        pages = self._held[replica].pop(request_id)
        for device in self._devices(self._plan.ranks_of(replica)):
            device.free_pages += pages
            device.wake()

    def _reserve(self, replica: int) -> set[int]:
        """Map what the replica's sequences need next, and preempt where there is nothing left. Returns who may step."""
        held, geometry = self._held[replica], self._geometries[replica]
        devices = self._devices(self._plan.ranks_of(replica))
        sequences = self._schedulers[replica].sequences(0)
        claims = [
            Claim(held.get(one.request_id, 0), geometry.pages(len(one.tokens), self._page_bytes)) for one in sequences
        ]
        granted, preempted = grow_or_preempt(min(device.unclaimed() for device in devices), claims, self._most_running)
        for index in preempted:
            sequences[index].cached = 0
            self._take(held, sequences[index].request_id, -claims[index].held, devices)
        for index in granted:
            self._take(held, sequences[index].request_id, claims[index].needed - claims[index].held, devices)
        if preempted:
            for device in devices:
                if device.claims:  # weights wait for what this gave back
                    self._clock.after(0.0, device.wake)
            self._ranks[0].preempted(tuple(sequences[index].request_id for index in preempted))
        return {sequences[index].request_id for index in granted}

    @staticmethod
    def _take(held: dict[int, int], request_id: int, pages: int, devices: Sequence[SharedDevice]) -> None:
        held[request_id] = held.get(request_id, 0) + pages
        for device in devices:
            device.free_pages -= pages

    def _devices(self, ranks: Sequence[int]) -> list[SharedDevice]:
        return [self._crowd.devices[self._plan.devices[rank]] for rank in ranks]

    def _weights_there(self) -> bool:
        at_work = any(scheduler.live for scheduler in self._schedulers)
        there = self._idle.there(self._clock.now_ns() / 1e9, at_work)
        if self._idle.due_s is not None and not self._looks_again:
            self._looks_again = True
            self._clock.after(max(self._idle.due_s - self._clock.now_ns() / 1e9, 0.0) + _LATER_S, self._look_again)
        return there

    def _look_again(self) -> None:
        self._looks_again = False
        self._again()

    def _count(self, name: str, amount: int) -> None:
        self._ranks[0].count(name, amount)

    def _again(self) -> None:
        if self._plans is None:
            self._begin()
