"""Pages of a worker's sequences, mapped under their runs as growth decides: the real backend's page source."""

from __future__ import annotations

import time
from collections.abc import Sequence as Seq
from contextlib import AbstractContextManager
from typing import Protocol

from serving.growth import PreemptingGrowth, preempting_growth
from serving.idle import IdleWeights
from serving.memory.kv_pool import KVPool, ModelKV, Run
from serving.pausing import PausedGrowth, growth_of
from serving.sequence import Sequence
from serving.workers.config import ModelWorkerConfig
from serving.workers.counters import Counters


class KVOfRuns(Protocol):
    """A model's KV on one device, or a replica's on several."""

    def grow(self, run: Run, tokens: int) -> int: ...


def grow_counted(kv: KVOfRuns, run: Run, tokens: int, counters: Counters) -> int:
    """`kv.grow`, with its time and the pages that had to be mapped in `counters`; how many those were."""
    started_ns = time.monotonic_ns()
    mapped = kv.grow(run, tokens)
    counters.add("mapping_ns", time.monotonic_ns() - started_ns)
    counters.add("pages_mapped", mapped)
    return mapped


class MappedPages:
    """The pages of `pool`, whose models the worker knows by their place in `models`."""

    def __init__(self, pool: KVPool, models: Seq[ModelKV], counters: Counters) -> None:
        self._lender, self._models, self._counters = pool.lender, list(models), counters
        self.num_pages = pool.num_pages

    @property
    def free_pages(self) -> int:
        return self._lender.unclaimed_pages

    def grow(self, sequence: Sequence, pages: int) -> None:
        grow_counted(self._models[sequence.model], sequence.run, len(sequence.tokens), self._counters)

    def drop(self, sequence: Sequence) -> None:
        self._models[sequence.model].release(sequence.run)

    def deciding(self) -> AbstractContextManager[object]:
        return self._lender.deciding()


def growth_over(
    role: ModelWorkerConfig,
    pool: KVPool,
    models: Seq[ModelKV],
    counters: Counters,
    weights: IdleWeights | None = None,
) -> PausedGrowth | PreemptingGrowth | None:
    """What decides over the growth of a worker's sequences, as its `role` says; None where admission has promised all.
    Without its `weights`, where those come and go, nobody grows."""
    if role.growth == "preempt":
        return preempting_growth(role, MappedPages(pool, models, counters), weights)
    return growth_of(role)
