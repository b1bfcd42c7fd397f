"""Groups on the simulated backend: the ranks' devices take time stage by stage and wait for each other as real ranks do.

A device that several groups share serves their stages in order of arrival, layer by layer. A group that is alone on all its
devices has nobody to give way to between layers, so that one event covers the same stage of all of them.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from serving.batching import StepLimits
from serving.cost.contention import Load
from serving.cost.operators import rounded
from serving.memory.kv_pool import KVGeometry
from serving.parallel.capacity import share_model
from serving.parallel.costs import GroupCosts, StepShape
from serving.scheduler import StepPlan, StepScheduler
from serving.sequence import Sequence as LiveSequence
from serving.sim.clock import VirtualClock
from serving.sim.costs import drawn_factor
from serving.sim.shared import SharedDevice
from serving.sim.workers import SIMULATED_TOKEN, SimulatedWorker
from serving.workers.config import GroupSeat, GroupWorkerConfig
from serving.workers.messages import Cancel, PoolUse, Preempted, Stop, Submit, Tokens

Stages = tuple[list[float], ...]  # seconds by rank, stage by stage


@dataclass(slots=True)
class _Repeats:
    """Decode steps of which each is the one before, one token on, as long as nobody comes: what differs from step to step is
    the context alone. `left` more will follow the one under way; `done` are over and not yet written into the sequences."""

    left: int
    told: tuple[tuple[int, int, bool], ...]  # what each tells the host
    batches: list[int]  # sequences by replica
    contexts: list[int]  # tokens by replica
    done: int = 0


class SimulatedGroup:
    """What the ranks of one group do together: its replicas' schedulers, and the step under way."""

    def __init__(
        self, seat: GroupSeat, costs: GroupCosts, limits: StepLimits, clock: VirtualClock, prefill: bool = True
    ) -> None:
        self._prefill = prefill
        self._plan, self._costs, self._clock = seat.group.plan, costs, clock
        self._spec = seat.model.spec
        self._ranks: list[SimulatedGroupWorker | None] = [None] * self._plan.ranks
        self._schedulers = [StepScheduler(1, limits) for _ in range(self._plan.dp)]
        shares = [share_model(seat.model, self._plan, self._plan.ranks_of(r)[0]) for r in range(self._plan.dp)]
        self._geometries = [KVGeometry.of(share.spec, share.dtype) for share in shares]
        self._held: list[dict[int, int]] = [{} for _ in range(self._plan.dp)]  # pages by request
        self._page_bytes = 0
        self._plans: list[StepPlan | None] | None = None
        self._repeats: _Repeats | None = None
        # Of decode steps that repeat, by the replicas' sequences and their contexts as costs see them.
        self._demands: dict[tuple[int, ...], Load | Stages] = {}
        self._posted: list[tuple[SimulatedGroupWorker, int]] = []  # bytes that ranks post in the step under way
        self._random = random.Random(self._spec.name)

    def join(self, rank: int, worker: SimulatedGroupWorker, page_bytes: int) -> None:
        self._ranks[rank] = worker
        self._page_bytes = page_bytes

    def pages(self, rank: int) -> int:
        """Pages in use on `rank`."""
        return sum(self._held[self._plan.replica_of(rank)].values())

    def holds_pages(self, rank: int) -> bool:
        return any(self._held[self._plan.replica_of(rank)].values())

    def submit(self, request: Submit, replica: int) -> None:
        prompt = list(request.prompt)
        sequence = LiveSequence(request.request_id, 0, prompt, len(prompt), request.max_new_tokens)
        if not self._prefill:
            sequence.cached = len(prompt) - 1
        self._schedulers[replica].add(sequence)
        self._end_repeats()
        if self._plans is None:
            self._begin()

    def cancel(self, request_id: int, replica: int) -> None:
        self._schedulers[replica].cancel(request_id, 0)
        self._end_repeats()

    # -- a step --------------------------------------------------------------------------------------------------------
    def _begin(self) -> None:
        plans = [scheduler.next_step() for scheduler in self._schedulers]
        if not any(plans):
            return
        for replica, plan in enumerate(plans):
            for (sequence, _), tokens in zip(plan.items, plan.kv_lens, strict=True) if plan else ():
                pages = self._geometries[replica].pages(tokens, self._page_bytes)
                held = self._held[replica]
                held[sequence.request_id] = max(pages, held.get(sequence.request_id, 0))
        self._start(plans)

    def _start(self, plans: list[StepPlan | None]) -> None:
        """Begin the step of `plans`, whose pages are held."""
        self._plans, self._repeats = plans, self._repeating(plans)
        shapes = [StepShape.of(plan.query_lens, plan.kv_lens) if plan else StepShape() for plan in plans]
        wanted = [len(plan.logit_rows) if plan else 0 for plan in plans]
        rows, layers = sum(shape.rows for shape in shapes), self._spec.num_layers
        own = [shapes[self._plan.replica_of(rank)].rows for rank in range(self._plan.ranks)]
        posted = [layers * self._costs.posted_bytes(mine, rows) for mine in own]
        self._posted = [(worker, count) for worker, count in zip(self._ranks, posted, strict=True) if count]
        self._occupy(self._demand(shapes, wanted))

    def _occupy(self, demand: Load | Stages) -> None:
        """Let the devices do what a step asks of them."""
        for worker, posted in self._posted:
            worker.count_bytes(posted)
        self._compute(demand)

    def _compute(self, demand: Stages) -> None:
        factor = drawn_factor(self._costs.spread, self._random)
        self._run(deque(demand if factor == 1 else [[seconds * factor for seconds in stage] for stage in demand]))

    def _demand(self, shapes: Sequence[StepShape], wanted: Sequence[int]) -> Stages:
        """Seconds by rank of each stage up to the next exchange of all."""
        costs, ranks, layers = self._costs, range(self._plan.ranks), range(self._spec.num_layers)
        passes = costs.passes(shapes)
        own = [shapes[self._plan.replica_of(rank)] for rank in ranks]
        embedding = [costs.embedding_s(shape.rows) for shape in own]
        attention = [costs.attention_s(shape) for shape in own]
        head = [costs.head_s(wanted[self._plan.replica_of(rank)]) for rank in ranks]
        if all(worker.serves_one for worker in self._ranks):
            together = [first + len(layers) * each for first, each in zip(embedding, attention, strict=True)]
            return together, [costs.all_ffns(passes).alone_s] * len(ranks), head
        stages = []
        for layer in layers:
            first = embedding if layer == 0 else [0.0] * len(ranks)
            stages.append([a + b for a, b in zip(first, attention, strict=True)])
            stages.append([costs.ffn_s(layer, passes)] * len(ranks))
        return (*stages, head)

    def _run(self, stages: deque[list[float]]) -> None:
        """Occupy every rank's device with the next stage; go on when the last of them is done."""
        if not stages:
            self._complete()
            return
        waiting = len(self._ranks)

        def arrived() -> None:
            nonlocal waiting
            waiting -= 1
            if not waiting:
                self._run(stages)

        for worker, seconds in zip(self._ranks, stages.popleft(), strict=True):
            worker.take(seconds, arrived)

    def _release(self, replica: int, request_id: int) -> None:
        del self._held[replica][request_id]

    def _complete(self) -> None:
        if self._repeats is not None:
            if self._repeats.left:
                self._repeat(self._repeats)
                return
            self._settle(self._repeats)
        plans, self._plans = self._plans, None
        items, first = [], False
        for replica, (scheduler, plan) in enumerate(zip(self._schedulers, plans, strict=True)):
            if plan is None:
                continue
            tokens = iter([SIMULATED_TOKEN] * len(plan.logit_rows))
            for sequence, token, last in scheduler.complete(plan, tokens):
                items.append((sequence.request_id, token, last))
                first |= len(sequence.tokens) == sequence.prompt_tokens + 1
                if last:
                    self._release(replica, sequence.request_id)
        self._ranks[0].report(tuple(items), first)
        for worker in self._ranks:
            worker.step_done()
        self._begin()

    # -- steps that repeat ---------------------------------------------------------------------------------------------
    def _repeating(self, plans: Sequence[StepPlan | None]) -> _Repeats | None:
        """How the step of `plans` repeats itself, each replica's sequences in the pages that they hold; None where it does not."""
        lefts: list[int] = []
        for scheduler, plan, geometry, held in zip(self._schedulers, plans, self._geometries, self._held, strict=True):
            if plan is None and scheduler.live:
                return None
            if plan is not None:
                lefts.append(scheduler.repeats(plan))
                for (sequence, _), tokens in zip(plan.items, plan.kv_lens, strict=True):
                    lefts.append(geometry.tokens_in(held[sequence.request_id], self._page_bytes) - tokens)
        if min(lefts) < 1:
            return None
        sequences = [sequence for plan in plans if plan for sequence, _ in plan.items]
        return _Repeats(
            min(lefts),
            tuple((sequence.request_id, SIMULATED_TOKEN, False) for sequence in sequences),
            [len(plan.items) if plan else 0 for plan in plans],
            [sum(plan.kv_lens) if plan else 0 for plan in plans],
        )

    def _repeat(self, repeats: _Repeats) -> None:
        """The step under way is over, and its like begins."""
        repeats.left -= 1
        repeats.done += 1
        self._ranks[0].report_repeated(repeats.told)
        all_hold = all(repeats.batches)
        for worker in self._ranks:
            worker.step_done(all_hold)
        contexts = repeats.contexts
        for replica, batch in enumerate(repeats.batches):
            contexts[replica] += batch
        key = (*repeats.batches, *map(rounded, contexts))
        demand = self._demands.get(key)
        if demand is None:
            shapes = [StepShape(*own) for own in zip(repeats.batches, contexts, strict=True)]
            demand = self._demands[key] = self._demand(shapes, repeats.batches)
        self._occupy(demand)

    def _end_repeats(self) -> None:
        """Somebody came or goes: what follows the step under way may be another one."""
        if self._repeats is not None:
            self._repeats.left = 0

    def _settle(self, repeats: _Repeats) -> None:
        """Write into sequences and plans what the steps that repeated themselves have done."""
        self._plans = [
            plan and scheduler.repeat(plan, repeats.done, SIMULATED_TOKEN)
            for scheduler, plan in zip(self._schedulers, self._plans, strict=True)
        ]
        self._repeats = None


class SimulatedGroupWorker(SimulatedWorker):
    """A device with seats in groups: serves their stages in order of arrival."""

    def __init__(
        self,
        name: str,
        clock: VirtualClock,
        role: GroupWorkerConfig,
        groups: list[SimulatedGroup],
        shared: SharedDevice | None = None,
    ) -> None:
        super().__init__(name, clock)
        self._shared = shared  # where engines run side by side
        self._role, self._groups = role, groups
        self._queue: deque[tuple[float, Callable[[], None]]] = deque()
        self._next_sample_ns = 0
        for pool in role.pools:
            for index in pool.models:
                groups[index].join(role.seats[index].rank, self, pool.page_bytes)

    def read_counters(self) -> dict[str, int]:
        busy_ns = self._counters["busy_ns"] + (round(self._shared.busy_s * 1e9) if self._shared else 0)
        return {**self._counters, "busy_ns": busy_ns}

    @property
    def serves_one(self) -> bool:
        return len(self._groups) == 1

    def send(self, message: Submit | Cancel | Stop) -> None:
        if isinstance(message, Submit):
            seat, replica = self._role.targets[message.model]
            self._groups[seat].submit(message, replica)
        elif isinstance(message, Cancel):
            seat, replica = self._role.targets[message.model]
            self._groups[seat].cancel(message.request_id, replica)

    def take(self, seconds: float, answer: Callable[[], None]) -> None:
        """Be busy for `seconds` once what came before is done, then `answer`."""
        self._queue.append((seconds, answer))
        self._wake()

    def count_bytes(self, posted: int) -> None:
        self._counters["bytes_crossed"] += posted

    def count(self, name: str, amount: int) -> None:
        """Add to one of the device's counters."""
        self._counters[name] = self._counters.get(name, 0) + amount

    def preempted(self, request_ids: tuple[int, ...]) -> None:
        self._counters["preemptions"] += len(request_ids)
        self._outbox.append(Preempted(self._clock.now_ns(), request_ids))

    def report(self, items: tuple[tuple[int, int, bool], ...], first: bool = False) -> None:
        """Tell the host of a step's tokens, among which somebody's `first` may be."""
        if items:
            self._outbox.append(Tokens(self._clock.now_ns(), items))
        if first and self._role.tells_first_tokens:
            self._clock.has_news = True

    def report_repeated(self, items: tuple[tuple[int, int, bool], ...]) -> None:
        """Tell the host of tokens that are nobody's first or last."""
        self._outbox.append_tokens(Tokens(self._clock.now_ns(), items))

    def step_done(self, holds_pages: bool = False) -> None:
        """Count a step and, where it is time or nothing is left (which is known not to be so where it `holds_pages`), sample
        the pools."""
        now_ns = self._clock.now_ns()
        self._counters["steps"] += 1
        soon = now_ns < self._next_sample_ns
        if soon and holds_pages:
            return
        seated = list(zip(self._role.seats, self._groups, strict=True))
        if soon and any(group.holds_pages(seat.rank) for seat, group in seated):
            return
        used = [group.pages(seat.rank) for seat, group in seated]
        self._next_sample_ns = now_ns + round(self._role.sample_interval_ms * 1e6)
        pools = tuple(
            (pool.name, {self._role.seats[index].model.name: used[index] for index in pool.models})
            for pool in self._role.pools
        )
        self._outbox.append(PoolUse(now_ns, pools))

    def _wake(self) -> None:
        if not self._busy and self._queue:
            self._occupy(*self._queue.popleft())
