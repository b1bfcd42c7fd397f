"""One rank of one group: its share of a model, moved along in lockstep with the other ranks.

A step is a generator that yields wherever rows of other ranks are needed, so the worker never blocks in it: while one group
waits, the worker moves on another group that has a seat on the same device, and groups whose devices overlap cannot wait
for each other in a circle. Rank 0 composes the steps of all replicas with the same scheduler as every other engine and
orders them; the tokens of a step are known to all ranks, so no rank is told what it can compute.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from serving.batching import StepLimits
from serving.layers.attention_half import AttentionHalf
from serving.layers.batch import BatchLayout
from serving.layers.ffn_half import FFNHalf
from serving.memory.kv_pool import ModelKV
from serving.parallel.exchange import Exchange
from serving.parallel.group import GroupPlan
from serving.parallel.orders import Accept, Cancelled, Step, decode, encode
from serving.scheduler import StepPlan, StepScheduler
from serving.sequence import Sequence
from serving.shm.ring import Ring
from serving.workers.messages import Submit
from serving.workers.timeline import ATTENTION, FFN, FINISH, Recorder

_FULL_RING_SLEEP_S = 0.0001
Produced = list[tuple[int, int, bool]]  # request id, token, whether it was the last


@dataclass(frozen=True)
class HeldShare:
    """What a rank holds: halves and KV of its share, and where its part of the vocabulary begins."""

    index: int  # of the seat, in its worker
    attention: AttentionHalf
    ffn: FFNHalf
    kv: ModelKV
    first_token: int


class GroupMember:
    """`orders` are the rings from rank 0: all of them there, one's own on every other rank."""

    def __init__(
        self,
        plan: GroupPlan,
        rank: int,
        share: HeldShare,
        exchange: Exchange,
        orders: list[Ring],
        limits: StepLimits,
        recorder: Recorder | None,
    ) -> None:
        self._plan, self._rank, self._share, self._exchange = plan, rank, share, exchange
        self._replica = plan.replica_of(rank)
        self._orders, self._recorder = orders, recorder
        self._untold: deque[tuple[int, Accept | Cancelled]] = (
            deque()
        )  # by rank; told between steps, when followers listen
        self._cancels: deque[tuple[int, int]] = deque()  # request id, replica; heeded between steps, by all ranks alike
        self._schedulers = [StepScheduler(1, limits) for _ in range(plan.dp)] if rank == 0 else []
        self._sequences: dict[int, Sequence] = {}  # of this rank's replica
        self._step: Iterator[None] | None = None
        self._scheduled: list[StepPlan | None] = []  # of rank 0, by replica
        self._produced: Produced = []
        self._hidden_size, self._dtype = share.attention.spec.hidden_size, share.attention.dtype
        self.steps = 0

    # -- for the worker ------------------------------------------------------------------------------------------------
    @property
    def in_step(self) -> bool:
        return self._step is not None

    @property
    def follows(self) -> bool:
        """Whether its steps are ordered by a rank elsewhere."""
        return self._rank > 0

    @property
    def bytes_posted(self) -> int:
        return self._exchange.bytes_posted

    def submit(self, request: Submit, replica: int) -> None:
        """Rank 0 takes a request of `replica` and tells that replica's other ranks."""
        accept = Accept(request.request_id, request.prompt, request.max_new_tokens, request.stop_ids)
        sequence = self._accept(accept) if replica == self._replica else _sequence(accept)
        self._schedulers[replica].add(sequence)
        for rank in self._plan.ranks_of(replica):
            if rank:
                self._untold.append((rank, accept))

    def cancel(self, request_id: int, replica: int) -> None:
        """Rank 0 lets a request of `replica` end with its next token, from the next step on."""
        self._cancels.append((request_id, replica))

    def poll(self) -> bool:
        """Begin a step, or move the one under way to its next exchange; False when there is nothing to do now."""
        if self._step is None:
            order = self._next_order()
            if order is None:
                return False
            self._step = self._run(order)
        elif not self._exchange.ready():
            return False
        try:
            next(self._step)
        except StopIteration:
            self._step = None
            self.steps += 1
        return True

    def take_produced(self) -> Produced:
        """Tokens of finished steps, on rank 0: those of every replica."""
        produced, self._produced = self._produced, []
        return produced

    # -- orders --------------------------------------------------------------------------------------------------------
    def _next_order(self) -> Step | None:
        if self._rank:
            return self._await_order()
        while self._cancels:
            self._heed_cancel(*self._cancels.popleft())
        self._scheduled = [scheduler.next_step() for scheduler in self._schedulers]
        if not any(self._scheduled):
            return None
        while self._untold:
            self._tell(*self._untold.popleft())
        order = Step(
            tuple(tuple((s.request_id, rows) for s, rows in plan.items) if plan else () for plan in self._scheduled),
            tuple(len(plan.logit_rows) if plan else 0 for plan in self._scheduled),
        )
        for rank in range(1, self._plan.ranks):
            self._tell(rank, order)
        return order

    def _await_order(self) -> Step | None:
        while (data := self._orders[0].pop()) is not None:
            order = decode(data)
            if isinstance(order, Step):
                return order
            if isinstance(order, Cancelled):
                self._sequences[order.request_id].cancelled = True
            else:
                self._accept(order)
        return None

    def _heed_cancel(self, request_id: int, replica: int) -> None:
        if self._schedulers[replica].cancel(request_id, 0):
            for rank in self._plan.ranks_of(replica):
                if rank:
                    self._untold.append((rank, Cancelled(request_id)))

    def _tell(self, rank: int, order: Accept | Cancelled | Step) -> None:
        data = encode(order)
        while not self._orders[rank - 1].push(data):
            time.sleep(_FULL_RING_SLEEP_S)  # the follower reads its ring between steps

    def _accept(self, accept: Accept) -> Sequence:
        sequence = self._sequences[accept.request_id] = _sequence(accept)
        sequence.run = self._share.kv.open_run()
        return sequence

    # -- a step --------------------------------------------------------------------------------------------------------
    def _run(self, order: Step) -> Iterator[None]:
        """One step from embedding to tokens; yields once an exchange."""
        started_ns = time.monotonic_ns()
        share, kv = self._share, self._share.kv
        items = tuple((self._sequences[name], rows) for name, rows in order.items[self._replica])
        plan = StepPlan(0, items, tuple(sequence.cached for sequence, _ in items))
        rows_of = [sum(rows for _, rows in items) for items in order.items]
        layout = self._layout(plan) if plan.items else None
        hidden = yield from self._embed(plan)
        ffn_out = None
        for layer in range(share.attention.spec.num_layers):
            if layout is None:
                attended = hidden
            else:
                attended, hidden = share.attention.attend_heads(layer, hidden, ffn_out, kv.layers[layer], layout)
            if self._plan.tp > 1:
                self._exchange.post(attended)
                self._record(started_ns, ATTENTION, layer, rows_of)
                yield
                started_ns = time.monotonic_ns()
                attended = self._exchange.total(
                    self._plan.ranks_of(self._replica), (len(hidden), self._hidden_size), self._dtype
                )
            ffn_in = hidden
            if layout is not None:
                hidden, ffn_in = share.attention.after_attention(layer, attended, hidden)
            self._record(started_ns, ATTENTION, layer, rows_of)
            ffn_in = yield from self._gather(ffn_in, rows_of)
            started_ns = time.monotonic_ns()
            partial = share.ffn.forward(layer, ffn_in)
            if self._plan.ranks > 1:
                self._exchange.post(partial)
            self._record(started_ns, FFN, layer, rows_of)
            yield
            started_ns = time.monotonic_ns()
            ffn_out = self._own_part(partial, rows_of)
        tokens = yield from self._sample(hidden, ffn_out, layout, order.wanted)
        self._record(started_ns, FINISH, share.attention.spec.num_layers, rows_of)
        self._finish(plan, tokens)

    def _layout(self, plan: StepPlan) -> BatchLayout:
        for (sequence, _), tokens in zip(plan.items, plan.kv_lens, strict=True):
            self._share.kv.grow(sequence.run, tokens)
        run_starts = tuple(sequence.run.start_slot for sequence, _ in plan.items)
        return BatchLayout(plan.query_lens, plan.kv_lens, run_starts, plan.logit_rows)

    def _embed(self, plan: StepPlan) -> Iterator[None]:
        """Hidden rows of the replica's tokens: each rank looks up those in its part of the vocabulary, zero elsewhere."""
        ids = torch.tensor(plan.token_ids, dtype=torch.int64)
        half = self._share.attention
        if self._plan.tp == 1:
            return half.embed(ids)
        ids = ids - self._share.first_token
        held = (ids >= 0) & (ids < half.spec.vocab_size)
        rows = half.embed(torch.where(held, ids, 0)) * held.unsqueeze(1)
        self._exchange.post(rows)
        yield
        return self._exchange.total(self._plan.ranks_of(self._replica), tuple(rows.shape), self._dtype)

    def _gather(self, ffn_in: torch.Tensor, rows_of: list[int]) -> Iterator[None]:
        """The FFN's input rows of all replicas, in order of replica."""
        if self._plan.dp == 1:
            return ffn_in
        self._exchange.post(ffn_in)
        yield
        parts = [
            self._exchange.rows(self._plan.ranks_of(replica)[0], (rows, self._hidden_size), self._dtype)
            for replica, rows in enumerate(rows_of)
        ]
        return torch.cat(parts)

    def _own_part(self, partial: torch.Tensor, rows_of: list[int]) -> torch.Tensor:
        """This replica's rows of the sum of all ranks' partial FFNs."""
        if self._plan.ranks == 1:
            return partial
        first = sum(rows_of[: self._replica])
        part = slice(first, first + rows_of[self._replica])
        return self._exchange.total(range(self._plan.ranks), tuple(partial.shape), self._dtype, part)

    def _sample(
        self, hidden: torch.Tensor, ffn_out: torch.Tensor, layout: BatchLayout | None, wanted: tuple[int, ...]
    ) -> Iterator[None]:
        """Greedy tokens by replica. Every rank posts its best logit and token of each wanted row; ties go to the lower id."""
        if not any(wanted):
            return [[] for _ in wanted]
        best = torch.empty(0, 2, dtype=torch.float64)
        if layout is not None and layout.logit_rows:
            logits, ids = self._share.attention.logits(hidden, ffn_out, layout).max(dim=-1)
            best = torch.stack([logits.double(), (ids + self._share.first_token).double()], dim=1)  # [W, 2]
        if self._plan.ranks == 1:
            return [best[:, 1].long().tolist()]
        self._exchange.post(best)
        yield
        return [self._best_of(replica, count) for replica, count in enumerate(wanted)]

    def _best_of(self, replica: int, count: int) -> list[int]:
        first, *others = self._plan.ranks_of(replica)
        best = self._exchange.rows(first, (count, 2), torch.float64)
        for rank in others:
            other = self._exchange.rows(rank, (count, 2), torch.float64)
            best = torch.where((other[:, 0] > best[:, 0]).unsqueeze(1), other, best)
        return best[:, 1].long().tolist()

    # -- its end -------------------------------------------------------------------------------------------------------
    def _finish(self, plan: StepPlan, tokens: list[list[int]]) -> None:
        if self._rank:
            ended = _advance(plan, tokens[self._replica])
        else:
            ended = []
            for replica, (scheduler, scheduled) in enumerate(zip(self._schedulers, self._scheduled, strict=True)):
                if scheduled is None:
                    continue
                produced = scheduler.complete(scheduled, iter(tokens[replica]))
                self._produced += [(sequence.request_id, token, last) for sequence, token, last in produced]
                ended += [s for s, _, last in produced if last and replica == self._replica]
        for sequence in ended:
            self._share.kv.close_run(sequence.run)
            del self._sequences[sequence.request_id]

    def _record(self, started_ns: int, stage: int, layer: int, rows_of: list[int]) -> None:
        if self._recorder is not None:
            rows = rows_of[self._replica] if stage != FFN else sum(rows_of)
            index = self._share.index
            self._recorder.add(started_ns, time.monotonic_ns(), stage, index, index, layer, rows)


def _sequence(accept: Accept) -> Sequence:
    return Sequence(
        accept.request_id, 0, list(accept.prompt), len(accept.prompt), accept.max_new_tokens, accept.stop_ids
    )


def _advance(plan: StepPlan, tokens: list[int]) -> list[Sequence]:
    """What the leader's scheduler does with a step's tokens, where there is none. Returns the sequences that ended."""
    sampled, ended = iter(tokens), []
    for sequence, rows in plan.items:
        complete = rows == sequence.pending
        sequence.cached += rows
        if complete and sequence.append(next(sampled)):
            ended.append(sequence)
    return ended
