"""Growth without a promise: pages go to the oldest that have begun, and who finds none takes them from the youngest. Pure.

What an elastic engine (SGLang over kvcached) and a multiplexer with quotas (MuxServe) do on exhaustion: the youngest running
request is preempted; its KV is dropped and computed again from its tokens once there is room. It keeps its place, so it
recovers before anyone younger begins. A request that has not begun gets what those that have leave, and nothing while one of
them is preempted.

Nobody livelocks: whoever is granted pages has all that its tokens so far need, so it gains at least one token before it can
be the one that finds none.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Protocol

from serving.idle import IdleWeights
from serving.memory.kv_pool import KVGeometry
from serving.quota import Quotas
from serving.scheduler import StepPlan
from serving.sequence import Sequence as LiveSequence
from serving.workers.config import ModelWorkerConfig


@dataclass(frozen=True, slots=True)
class Claim:
    """One sequence: pages it holds (0: it has not begun, or was preempted) and pages it needs for its next step."""

    held: int
    needed: int


def grow_or_preempt(
    free_pages: int, claims: Sequence[Claim], most_running: int | None = None
) -> tuple[list[int], list[int]]:
    """Of `claims`, oldest first, and the pages free to them: indices of those that have what they need now, and of those
    that lose what they hold. Nobody begins beside `most_running` others (those that could not step would only hold KV)."""
    granted: list[int] = []
    preempted: list[int] = []
    for index, claim in enumerate(claims):
        if not claim.held or index in preempted:
            continue
        more = max(claim.needed - claim.held, 0)
        for victim in range(len(claims) - 1, index, -1):
            if more <= free_pages:
                break
            if claims[victim].held and victim not in preempted:
                preempted.append(victim)
                free_pages += claims[victim].held
        if more <= free_pages:
            free_pages -= more
            granted.append(index)
        else:
            preempted.append(index)
            free_pages += claim.held
    for index, claim in enumerate(claims):
        if claim.held:
            continue
        if preempted or claim.needed > free_pages or len(granted) == most_running:
            break  # first come first served: none overtakes one that waits
        free_pages -= claim.needed
        granted.append(index)
    return sorted(granted), preempted


class PageSource(Protocol):
    """Where the pages of a worker's sequences come from. `num_pages` is all there are, for everyone."""

    num_pages: int

    @property
    def free_pages(self) -> int: ...

    def grow(self, sequence: LiveSequence, pages: int) -> None:
        """Let `sequence` hold `pages` pages, enough for its tokens so far."""
        ...

    def drop(self, sequence: LiveSequence) -> None:
        """Take away all that `sequence` holds."""
        ...

    def deciding(self) -> AbstractContextManager[object]:
        """While it lasts nobody else takes pages, so that what was seen free still is."""
        ...


class CountedPages:
    """Pages that are only counted: the simulated backend's."""

    def __init__(self, num_pages: int) -> None:
        self.num_pages = self.free_pages = num_pages
        self._held: dict[LiveSequence, int] = {}

    def grow(self, sequence: LiveSequence, pages: int) -> None:
        self.free_pages -= pages - self._held.get(sequence, 0)
        self._held[sequence] = pages

    def drop(self, sequence: LiveSequence) -> None:
        self.free_pages += self._held.pop(sequence, 0)

    def deciding(self) -> AbstractContextManager[object]:
        return nullcontext()


class PreemptingGrowth:
    """The live sequences of a worker, by model and oldest first, and what each holds of `source`. `pages_of(model, tokens)`
    counts a sequence's pages; with `quotas` a model has its quota of the pool and no more; with `weights`, which may be absent,
    nobody steps without them. One step at a time: no sequence
    is in flight while it is decided who may step."""

    def __init__(
        self,
        num_models: int,
        source: PageSource,
        pages_of: Callable[[int, int], int],
        most_running: int,
        quotas: Quotas | None = None,
        weights: IdleWeights | None = None,
    ) -> None:
        self._weights = weights
        self._source, self._pages_of, self._most_running, self._quotas = source, pages_of, most_running, quotas
        self._live: list[dict[LiveSequence, int]] = [{} for _ in range(num_models)]
        self._preempted: list[int] = []

    @property
    def held_pages(self) -> list[int]:
        """By model."""
        return [sum(live.values()) for live in self._live]

    def add(self, sequence: LiveSequence) -> None:
        self._live[sequence.model][sequence] = 0

    def remove(self, sequence: LiveSequence) -> None:
        """`sequence` has ended; its pages go back."""
        if self._live[sequence.model].pop(sequence):
            self._source.drop(sequence)

    def take(self, plan: StepPlan) -> None:
        """The step `plan` begins; its pages were taken when it was decided who may step."""

    def take_preempted(self) -> tuple[int, ...]:
        """Requests that were preempted since the last call."""
        preempted, self._preempted = self._preempted, []
        return tuple(preempted)

    def may_step(self, now_s: float) -> Callable[[LiveSequence], bool]:
        """Who may take part in the next step, all of them together: they hold the pages of their tokens so far."""
        at_work = any(self._live)
        if self._weights is not None and not self._weights.there(now_s, at_work):
            return frozenset().__contains__
        if not at_work:
            return frozenset().__contains__
        self._adapt_in_time(now_s)
        allowed = self._settle()
        if self._quotas is not None and not allowed:
            # Nobody holds a page, so whoever is first can be given what it needs, whatever its quota was.
            self._quotas.adapt(self.held_pages, self._backlogs())
            allowed = self._settle()
        return allowed.__contains__

    def repeat(self, now_s: float) -> None:
        """A step begins of all live sequences, which hold the pages of their tokens so far."""
        self._adapt_in_time(now_s)

    def _adapt_in_time(self, now_s: float) -> None:
        if self._quotas is not None and self._quotas.due(now_s):
            self._quotas.adapt(self.held_pages, self._backlogs())

    def _settle(self) -> set[LiveSequence]:
        allowed: set[LiveSequence] = set()
        with self._source.deciding():
            for model, live in enumerate(self._live):
                sequences = list(live)
                claims = [Claim(live[one], self._needed(one)) for one in sequences]
                granted, preempted = grow_or_preempt(self._free(model), claims, self._most_running)
                for index in preempted:
                    self._preempt(sequences[index])
                for index in granted:
                    claim = claims[index]
                    if claim.needed > claim.held:
                        self._source.grow(sequences[index], claim.needed)
                        live[sequences[index]] = claim.needed
                    allowed.add(sequences[index])
        return allowed

    def _free(self, model: int) -> int:
        free = self._source.free_pages
        if self._quotas is None:
            return free
        return max(min(free, self._quotas.pages[model] - sum(self._live[model].values())), 0)

    def _needed(self, sequence: LiveSequence) -> int:
        return self._pages_of(sequence.model, len(sequence.tokens))

    def _preempt(self, sequence: LiveSequence) -> None:
        self._source.drop(sequence)
        self._live[sequence.model][sequence] = 0
        sequence.cached = 0
        self._preempted.append(sequence.request_id)

    def _backlogs(self) -> list[int]:
        """By model, the pages that its first waiting sequence needs; 0 where none waits."""
        return [next((self._needed(sequence) for sequence, held in live.items() if not held), 0) for live in self._live]


def preempting_growth(
    role: ModelWorkerConfig, source: PageSource, weights: IdleWeights | None = None
) -> PreemptingGrowth:
    """The growth of a worker with one pool, over `source`, which has its pages, and with `weights` that may be absent."""
    (pool,) = role.pools
    geometries = [KVGeometry.of(model.spec, model.dtype) for model in role.models]
    quotas = Quotas(role.quotas, pool.num_pages) if role.quotas else None
    return PreemptingGrowth(
        len(role.models),
        source,
        lambda model, tokens: geometries[model].pages(tokens, pool.page_bytes),
        role.limits.max_batch,
        quotas,
        weights,
    )
