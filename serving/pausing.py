"""Growth without preemption where admission promised less than the cap: who may take pages now, and who pauses. Pure.

A sequence is given the pages of its next step unless that could leave no order in which all can finish (Dijkstra's banker,
:func:`serving.admission.safe`), so a pause always ends. One that has not begun waits behind any older one that pauses, so
that newcomers cannot keep it waiting for ever.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from serving.admission import safe
from serving.memory.kv_pool import KVGeometry
from serving.scheduler import StepPlan
from serving.sequence import Sequence as LiveSequence
from serving.workers.config import ModelWorkerConfig

GROWTHS = ("reserved", "pause")


@dataclass(frozen=True, slots=True)
class Claim:
    """One live sequence, in pages: what it holds, what it must hold for its next step, and the most it may ever hold."""

    held: int
    next: int
    most: int


def may_take(free_pages: int, claims: Sequence[Claim]) -> list[bool]:
    """For each of `claims`, oldest first, whether it may hold what its next step needs; all that may, may together."""
    held = [claim.held for claim in claims]
    granted: list[bool] = []
    paused = False
    for index, claim in enumerate(claims):
        more = claim.next - claim.held
        if more <= 0:
            granted.append(True)
            continue
        may = more <= free_pages and not (paused and not claim.held)
        if may:
            held[index] += more
            may = safe(free_pages - more, ((h, c.most - h) for h, c in zip(held, claims, strict=True)))
            if may:
                free_pages -= more
            else:
                held[index] -= more
        paused = paused or not may
        granted.append(may)
    return granted


def growth_of(role: ModelWorkerConfig) -> PausedGrowth | None:
    """The pausing growth of a worker's pool, or None where admission has promised all that sequences need."""
    if role.growth == "reserved":
        return None
    (pool,) = role.pools
    geometries = [KVGeometry.of(model.spec, model.dtype) for model in role.models]
    return PausedGrowth(
        pool.num_pages,
        lambda model, tokens: geometries[model].pages(tokens, pool.page_bytes),
        role.limits.prefill_chunk,
    )


class PausedGrowth:
    """The live sequences of one pool of `budget_pages`, oldest first, and what each holds. `pages_of(model, tokens)` counts a
    sequence's pages; a step takes at most `chunk_rows` rows of a sequence."""

    def __init__(self, budget_pages: int, pages_of: Callable[[int, int], int], chunk_rows: int) -> None:
        self._budget_pages, self._pages_of, self._chunk_rows = budget_pages, pages_of, chunk_rows
        self._held: dict[LiveSequence, int] = {}  # in order of arrival

    def add(self, sequence: LiveSequence) -> None:
        self._held[sequence] = 0

    def remove(self, sequence: LiveSequence) -> None:
        del self._held[sequence]

    def take(self, plan: StepPlan) -> None:
        """The step `plan`, of sequences that may, begins."""
        for (sequence, _), tokens in zip(plan.items, plan.kv_lens, strict=True):
            pages = self._pages_of(sequence.model, tokens)
            self._held[sequence] = max(self._held[sequence], pages)

    def repeat(self, now_s: float) -> None:
        """A step begins of all live sequences, which hold the pages of their tokens so far: nothing changes."""

    def take_preempted(self) -> tuple[int, ...]:
        """Nobody, ever."""
        return ()

    def may_step(self, now_s: float) -> Callable[[LiveSequence], bool]:
        """Who may take part in the next step, all of them together."""
        claims = [self._claim(sequence, held) for sequence, held in self._held.items()]
        free = self._budget_pages - sum(self._held.values())
        allowed = {one for one, may in zip(self._held, may_take(free, claims), strict=True) if may}
        return allowed.__contains__

    def _claim(self, sequence: LiveSequence, held: int) -> Claim:
        most = self._pages_of(sequence.model, sequence.most_cached)
        if sequence.in_flight:
            return Claim(held, held, most)
        tokens = sequence.cached + min(sequence.pending, self._chunk_rows)
        return Claim(held, max(held, self._pages_of(sequence.model, tokens)), most)
