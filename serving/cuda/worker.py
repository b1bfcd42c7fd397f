"""The model worker on cards: whole steps are launched and then looked for, where the CPU's computes them itself."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

from serving.cuda.runner import StepRunner
from serving.memory.kv_pool import KVPool
from serving.residency.lent_weights import LentWeights
from serving.scheduler import StepPlan
from serving.workers.model_worker import HostedModel, ModelWorker, Produced
from serving.workers.swap_worker import Swapping
from serving.workers.timeline import ATTENTION


@dataclass(slots=True)
class Launched:
    """A step that is under way on the cards."""

    model: HostedModel
    plan: StepPlan
    started_ns: int


class LaunchingWorker(ModelWorker):
    """Launches steps and looks for their ends; everything else is the CPU worker's. Its busy time is the time from a step's launch
    to its end as the host sees it, of one lane at least."""

    _busy_since_ns = 0

    def _done(self, lane: int) -> bool:
        """Whether the lane's step is done."""
        raise NotImplementedError

    def _poll(self) -> bool:
        progressed = self._take_control() if not self._control.empty else False
        for lane, step in enumerate(self._lanes):
            if step is None:
                progressed |= self._begin(lane)
            elif self._done(lane):
                self._lanes[lane] = None
                ended = self._end(lane, step)
                self._begin(lane)  # first: meanwhile the card waits for nothing
                for produced in ended:
                    self._tell(produced)
                progressed = True
        return progressed

    def _rest(self, idle_spins: int) -> None:
        if not any(self._lanes):
            super()._rest(idle_spins)

    def _occupy(self, lane: int, step: object, now_ns: int) -> None:
        """`step` has the lane from now on."""
        if not any(self._lanes):
            self._busy_since_ns = now_ns
        self._lanes[lane] = step

    def _end(self, lane: int, step: object) -> list[list[Produced]]:
        """Take what the step gave, which is done: what is to be told of it, by model."""
        raise NotImplementedError

    def _count_busy(self) -> int:
        """A step has ended now: the time, in nanoseconds."""
        ended_ns = time.monotonic_ns()
        self._counters.add("busy_ns", ended_ns - self._busy_since_ns)
        self._busy_since_ns = ended_ns
        return ended_ns


class CardWorker(LaunchingWorker):
    """Runs steps through `runner`. `weights` are those that may come while steps run, if any do."""

    def __init__(
        self,
        runner: StepRunner,
        models: Sequence[HostedModel],
        pools: Sequence[tuple[str, KVPool]],
        *rest,
        weights: LentWeights | None = None,
        **options,
    ):
        super().__init__(models, pools, *rest, **options)
        self._runner, self._weights = runner, weights

    def run(self) -> None:
        super().run()
        self._runner.close()

    def _poll(self) -> bool:
        if self._weights is not None:
            self._weights.poll()
        return super()._poll()

    def _done(self, lane: int) -> bool:
        return self._runner.done(lane)

    def _begin(self, lane: int) -> bool:
        plan = self._next_plan(time.monotonic_ns())
        if plan is None:
            return False
        model = self._models[plan.model]
        now_ns = time.monotonic_ns()
        self._occupy(lane, Launched(model, plan, now_ns), now_ns)
        self._runner.launch(lane, plan.model, plan)
        return True

    def _end(self, lane: int, step: Launched) -> list[list[Produced]]:
        ended_ns = self._count_busy()
        if self._recorder is not None:
            rows = sum(step.plan.query_lens)
            self._recorder.add(step.started_ns, ended_ns, ATTENTION, lane, step.model.index, 0, rows)
        return [self._complete(step, self._runner.result(lane) if step.plan.logit_rows else [])]


class CardSwapWorker(Swapping, CardWorker):
    """A card's worker whose models come and go."""
