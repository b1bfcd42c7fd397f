"""A card that both pools of CrossPool share: steps in flight run there side by side.

Each lane has a stream for either side on the card (serving/cuda/lane.py), so nothing orders the lanes: neither side serves one after
the other, as devices of a pipeline do, and a step waits for nobody. Whole steps, with what crossing between their sides takes, slow
each other by the rule of serving/cost/contention.py while both are under way.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass

from serving.cost.contention import Contention, Load
from serving.cost.stages import ModelStages
from serving.parallel.costs import GroupCosts, StepShape
from serving.parallel.group import GroupPlan
from serving.scheduler import StepPlan
from serving.sim.clock import VirtualClock
from serving.sim.pipeline import Pipeline
from serving.sim.shared import Crowd, SharedDevice
from serving.sim.workers import SimulatedModelWorker

_CARD = "card"


@dataclass(frozen=True)
class WholeStep:
    """A step as one load of the card. `crossed_bytes` go from side to side in it."""

    payload: tuple[StepPlan, int]
    load: Load
    crossed_bytes: int


class SharedCard:
    """The `lanes` of one card, costs of which are like those of `stages`. `begin()` gives the next step or None, and is not asked again
    before a sequence is submitted or a step ends; `complete(payload)` takes a step that is done."""

    def __init__(
        self,
        clock: VirtualClock,
        stages: ModelStages,
        lanes: int,
        begin: Callable[[], WholeStep | None],
        complete: Callable[[tuple[StepPlan, int]], None],
    ) -> None:
        self.crossed_bytes = 0
        self._begin, self._complete, self._free_lanes = begin, complete, lanes
        self._card = SharedDevice(stages.hardware, free_pages=0)
        self._crowd = Crowd(clock, Contention(), stages.dtype)
        self._crowd.devices[_CARD] = self._card

    @property
    def busy_ns(self) -> int:
        """With a step in one lane at least."""
        return round(self._card.busy_s * 1e9)

    def submit(self) -> None:
        """Something may be ready: free lanes look for a step each."""
        while self._free_lanes and (step := self._begin()) is not None:
            self._free_lanes -= 1
            self._crowd.start(step.load, (_CARD,), functools.partial(self._end, step))

    def _end(self, step: WholeStep) -> None:
        self._free_lanes += 1
        self.crossed_bytes += step.crossed_bytes
        self._complete(step.payload)
        self.submit()


class SharedCardWorker(SimulatedModelWorker):
    """Drives the card that holds its models' KV, attention and all of their FFNs."""

    def _add_device(self, pipeline: Pipeline, memory: int) -> SharedCard:
        alone = GroupPlan((self._role.device.name,))
        self._costs = [GroupCosts(times.stages, alone) for times in self._times]
        return SharedCard(self._clock, self._times[0].stages, self._role.lanes, self._begin, self._complete)

    def _step_of(self, plan: StepPlan) -> WholeStep:
        query_lens, route = plan.query_lens, self._routes[plan.model]
        stages, rows = self._times[plan.model].stages, sum(query_lens)
        load = self._costs[plan.model].step_load([StepShape.of(query_lens, plan.kv_lens)])
        crossing_s = stages.spec.num_layers * route.both_ways_ns(stages, rows) / 1e9
        return WholeStep(
            (plan, len(plan.logit_rows)),
            dataclasses.replace(load, alone_s=load.alone_s + crossing_s),
            stages.spec.num_layers * 2 * rows * route.row_bytes,
        )
