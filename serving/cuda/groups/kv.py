"""KV of a replica: the same run in a pool on each of its ranks' cards, and who may step when pages are found as they come."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from collections.abc import Sequence as Seq
from contextlib import ExitStack, contextmanager

from serving.growth import PreemptingGrowth
from serving.memory.kv_pool import KVPool, ModelKV, Run
from serving.scheduler import StepPlan
from serving.sequence import Sequence
from serving.workers.counters import Counters
from serving.workers.mapped_pages import grow_counted


class ReplicaKV:
    """The KV of one model on the ranks of one replica, as :class:`serving.memory.kv_pool.ModelKV` is that of one device. All ranks
    do the same in the same order, so a run has the same slots on each; the first rank's stands for all."""

    def __init__(self, ranks: Seq[ModelKV]) -> None:
        self._first, *self._others = ranks
        self.geometry = self._first.geometry
        self._runs: dict[int, list[Run]] = {}  # on the other ranks, by the first one's index

    def open_run(self) -> Run:
        run, others = self._first.open_run(), [kv.open_run() for kv in self._others]
        if any(other.index != run.index for other in others):
            raise RuntimeError(
                f"ranks of {self.geometry.model} have come apart: run {run.index} is not the same on all"
            )
        self._runs[run.index] = others
        return run

    def grow(self, run: Run, tokens: int) -> int:
        mapped = self._first.grow(run, tokens)
        for kv, other in zip(self._others, self._runs[run.index], strict=True):
            kv.grow(other, tokens)
        return mapped

    def release(self, run: Run) -> None:
        self._first.release(run)
        for kv, other in zip(self._others, self._runs[run.index], strict=True):
            kv.release(other)

    def close_run(self, run: Run) -> None:
        self._first.close_run(run)
        for kv, other in zip(self._others, self._runs.pop(run.index), strict=True):
            kv.close_run(other)


class ReplicaPages:
    """Pages of a replica's sequences, which are the same number on each of its cards: as many are free as where fewest are.
    `pools` come in the order of their cards, in which every engine locks them, so that none waits for another in a circle."""

    def __init__(self, pools: Seq[KVPool], kv: ReplicaKV, counters: Counters) -> None:
        self._lenders, self._kv, self._counters = [pool.lender for pool in pools], kv, counters
        self.num_pages = min(pool.num_pages for pool in pools)

    @property
    def free_pages(self) -> int:
        return min(lender.unclaimed_pages for lender in self._lenders)

    def grow(self, sequence: Sequence, pages: int) -> None:
        grow_counted(self._kv, sequence.run, len(sequence.tokens), self._counters)

    def drop(self, sequence: Sequence) -> None:
        self._kv.release(sequence.run)

    @contextmanager
    def deciding(self) -> Iterator[None]:
        with ExitStack() as held:
            for lender in self._lenders:
                held.enter_context(lender.deciding())
            yield


class GroupGrowth:
    """The growth of every replica of a group, each over its own cards; a sequence's `model` is its replica."""

    def __init__(self, replicas: Seq[PreemptingGrowth]) -> None:
        self._replicas = list(replicas)

    def add(self, sequence: Sequence) -> None:
        self._replicas[sequence.model].add(sequence)

    def remove(self, sequence: Sequence) -> None:
        self._replicas[sequence.model].remove(sequence)

    def take(self, plan: StepPlan) -> None:
        self._replicas[plan.model].take(plan)

    def take_preempted(self) -> tuple[int, ...]:
        return tuple(request_id for growth in self._replicas for request_id in growth.take_preempted())

    def may_step(self, now_s: float) -> Callable[[Sequence], bool]:
        allowed = [growth.may_step(now_s) for growth in self._replicas]
        return lambda sequence: allowed[sequence.model](sequence)
