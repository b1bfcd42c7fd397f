"""The worker of models that lie on several cards each: one process drives all cards of all its groups."""

from __future__ import annotations

import time
from collections.abc import Sequence as Seq
from dataclasses import dataclass

from serving.cuda.groups.runner import GroupRunner
from serving.cuda.worker import Launched, LaunchingWorker
from serving.memory.kv_pool import KVPool
from serving.scheduler import StepPlan
from serving.workers.model_worker import HostedModel, Produced
from serving.workers.timeline import ATTENTION


@dataclass(frozen=True)
class _Step:
    """A step of a group that is under way: its replicas' plans, None where one has nothing to do."""

    plans: tuple[StepPlan | None, ...]
    started_ns: int


class CardGroupWorker(LaunchingWorker):
    """Each group has a lane of its own, and its replicas are models to the scheduler, numbered through from the first group's
    first: `runners[i]` steps the replicas `replicas[i]` together."""

    def __init__(
        self,
        runners: Seq[GroupRunner],
        replicas: Seq[range],
        models: Seq[HostedModel],
        pools: Seq[tuple[str, KVPool]],
        *rest,
        **options,
    ):
        super().__init__(models, pools, *rest, **options)
        self._runners, self._replicas = list(runners), list(replicas)

    def run(self) -> None:
        super().run()
        for runner in self._runners:
            runner.close()

    def _done(self, lane: int) -> bool:
        return self._runners[lane].done()

    def _begin(self, lane: int) -> bool:
        now_ns = time.monotonic_ns()
        plans = self._plans_of(self._replicas[lane], now_ns)
        if not any(plans):
            return False
        self._occupy(lane, _Step(plans, now_ns), now_ns)
        self._runners[lane].launch(plans)
        return True

    def _plans_of(self, replicas: range, now_ns: int) -> tuple[StepPlan | None, ...]:
        """A step of each of `replicas` that has something to do, by replica."""
        plans: dict[int, StepPlan] = {}
        may_step = self._may_step(now_ns)

        def waits(sequence) -> bool:
            number = sequence.model
            return number in replicas and number not in plans and (may_step is None or may_step(sequence))

        while (plan := self._scheduler.next_step(waits)) is not None:
            self._take(plan)
            plans[plan.model] = plan
        return tuple(plans.get(number) for number in replicas)

    def _end(self, lane: int, step: _Step) -> list[list[Produced]]:
        ended_ns, ended = self._count_busy(), []
        for plan, tokens in zip(step.plans, self._runners[lane].result(), strict=True):
            if plan is None:
                continue
            if self._recorder is not None:
                rows = sum(plan.query_lens)
                self._recorder.add(step.started_ns, ended_ns, ATTENTION, lane, plan.model, 0, rows)
            ended.append(self._complete(Launched(self._models[plan.model], plan, step.started_ns), tokens))
        return ended
