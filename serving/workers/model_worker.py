"""The worker that holds KV: attention halves of its models, their KV pools, and the lanes that batches move along.

A lane carries one in-flight batch with its own model and layer cursor. The worker polls: it takes control messages, starts
a batch in every free lane, and moves on every lane whose hidden rows have come back from their FFN, which lies in this
process (static) or across the pool boundary (CrossPool). No lane waits for another, so models of unequal depth share the
device without a barrier, and a lane that finishes is given its next batch at once. The host is not on this path.
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass

import torch

from serving.batching import StepLimits
from serving.growth import PreemptingGrowth
from serving.layers.attention_half import AttentionHalf
from serving.layers.batch import BatchLayout
from serving.memory.kv_pool import KVPool, ModelKV
from serving.pausing import PausedGrowth
from serving.scheduler import Profiles, StepPlan, StepScheduler
from serving.sequence import Sequence
from serving.shm.ring import BelledRing, Ring
from serving.workers.counters import Counters
from serving.workers.mapped_pages import grow_counted
from serving.workers.messages import Cancel, Expired, PoolUse, Preempted, Stop, Submit, Tokens, decode, encode
from serving.workers.ports import FFNPort
from serving.workers.timeline import A2F, ATTENTION, FINISH, Recorder

_MAP_AHEAD_TOKENS = 16  # keep this many tokens mapped beyond the last one where there is idle time to do it
_SPINS_BEFORE_YIELD = 64  # longer than a crossing takes; from then on others that want this core get it
_SPINS_BEFORE_SLEEP = 2000
_LOOK_S = 0.0003  # how often a worker whose sequences wait for others (for pages, for their turn) looks again
# A worker without sequences is woken by the next message; what it does by the clock may be so late. Naps of 0.3 ms cost whoever
# shares its core 13 % of a decode step, naps of 20 ms nothing that could be measured.
LONGEST_IDLE_S = 0.02


@dataclass(frozen=True)
class HostedModel:
    """A model as its worker holds it. `ffn_index` is the number its FFN port knows it by."""

    index: int
    half: AttentionHalf
    kv: ModelKV
    port: FFNPort
    ffn_index: int
    num_layers: int


Produced = tuple[Sequence, int, bool]  # a sequence, its new token, whether that was its last


@dataclass(slots=True)
class InFlight:
    """One in-flight batch: its step, and how far it has come."""

    model: HostedModel
    plan: StepPlan
    layout: BatchLayout
    hidden: torch.Tensor  # [T, D]
    layer: int = 0
    after: tuple[
        InFlight, ...
    ] = ()  # steps with earlier chunks of the same prompts, whose KV each layer of this one reads

    @property
    def may_go_on(self) -> bool:
        """Whether those before it have written the KV of the layer that it comes to."""
        return all(earlier.layer > self.layer for earlier in self.after)


class ModelWorker:
    """Runs `models` over `pools` with `lanes` in-flight batches until it is told to stop."""

    def __init__(
        self,
        models: Seq[HostedModel],
        pools: Seq[tuple[str, KVPool]],
        limits: StepLimits,
        lanes: int,
        control: BelledRing,
        tokens: Ring,
        counters: Counters,
        sample_interval_ms: float,
        recorder: Recorder | None = None,
        stages: int = 4,
        growth: PausedGrowth | PreemptingGrowth | None = None,
        profiles: Profiles = (),
        prefill_first: bool = False,
        shares_core: bool = False,
        chunks_in_flight: int = 1,
    ) -> None:
        """Where it `shares_core` with other engines, it sleeps when it has nothing to do, and is busy for the time that it
        gets, not for the time that passes."""
        self._models = list(models)
        self._pools = list(pools)
        self._scheduler = StepScheduler(len(self._models), limits, profiles, prefill_first, chunks_in_flight)
        self._shares_core = shares_core
        self._lanes: list[InFlight | None] = [None] * lanes
        self._control, self._tokens, self._counters = control, tokens, counters
        self._recorder = recorder
        self._transfers_apart = stages == 4
        self._growth = growth
        self._sample_interval_ns = int(sample_interval_ms * 1e6)
        self._next_sample_ns = 0
        self._map_ahead: deque[tuple[HostedModel, Sequence]] = deque()
        self._stopping = False
        for _, pool in self._pools:
            pool.map_first_pages(lanes * limits.max_batch)

    def run(self) -> None:
        """Serve until a Stop message. Every iteration does what can be done now and waits for nothing."""
        idle_spins = 0
        with torch.inference_mode():
            while not self._stopping:
                if self._shares_core:
                    started_ns = time.thread_time_ns()
                    progressed = self._poll()
                    self._counters.add("busy_ns", (time.thread_time_ns() - started_ns) * progressed)
                else:
                    progressed = self._poll()
                if progressed:
                    idle_spins = 0
                    continue
                idle_spins += 1
                if not self._map_one_ahead():
                    self._rest(idle_spins)

    def _poll(self) -> bool:
        progressed = self._take_control() if not self._control.empty else False
        for lane, step in enumerate(self._lanes):
            if step is None:
                progressed |= self._begin(lane)
            elif step.model.port.done(lane) and step.may_go_on:
                self._advance(lane, step)
                progressed = True
        return progressed

    def _rest(self, idle_spins: int) -> None:
        for step in self._lanes:
            if step is not None:
                step.model.port.rest()
                if idle_spins > _SPINS_BEFORE_YIELD:
                    os.sched_yield()
                return
        if idle_spins > _SPINS_BEFORE_SLEEP or self._shares_core:
            self._control.wait(_LOOK_S if self._scheduler.live else LONGEST_IDLE_S)

    # -- control -------------------------------------------------------------------------------------------------------
    def _take_control(self) -> bool:
        while (data := self._control.pop()) is not None:
            message = decode(data)
            if isinstance(message, Stop):
                self._stopping = True
            elif isinstance(message, Cancel):
                self._scheduler.cancel(message.request_id, message.model)
            else:
                self._accept(message)
        return True

    def _accept(self, request: Submit) -> None:
        sequence = Sequence(
            request_id=request.request_id,
            model=request.model,
            tokens=list(request.prompt),
            prompt_tokens=len(request.prompt),
            max_new_tokens=request.max_new_tokens,
            stop_ids=request.stop_ids,
            run=self._models[request.model].kv.open_run(),
            since_ns=request.since_ns,
        )
        self._scheduler.add(sequence)
        if self._growth:
            self._growth.add(sequence)

    # -- the life of a step --------------------------------------------------------------------------------------------
    def _begin(self, lane: int) -> bool:
        started_ns = time.monotonic_ns()
        plan = self._next_plan(started_ns)
        if plan is None:
            return False
        model = self._models[plan.model]
        run_starts = tuple(sequence.run.start_slot for sequence, _ in plan.items)
        layout = BatchLayout(plan.query_lens, plan.kv_lens, run_starts, plan.logit_rows)
        hidden = model.half.embed(torch.tensor(plan.token_ids))
        hidden, ffn_in = model.half.attend(0, hidden, None, model.kv.layers[0], layout)
        self._lanes[lane] = step = InFlight(model, plan, layout, hidden, after=self._earlier_chunks(plan))
        self._send(started_ns, lane, step, ffn_in)
        return True

    def _next_plan(self, now_ns: int) -> StepPlan | None:
        """The step to begin next, its pages mapped; None where nobody may step."""
        plan = self._scheduler.next_step(self._may_step(now_ns))
        if plan is not None:
            self._take(plan)
        return plan

    def _may_step(self, now_ns: int) -> Callable[[Sequence], bool] | None:
        """Who may, where growth decides it, and whoever was preempted for them reported; else None."""
        if not self._growth:
            return None
        may_step = self._growth.may_step(now_ns / 1e9)
        if preempted := self._growth.take_preempted():
            self._counters.add("preemptions", len(preempted))
            self._report(Preempted(time.monotonic_ns(), preempted))
        return may_step

    def _take(self, plan: StepPlan) -> None:
        """The step `plan` begins: its pages are mapped."""
        if self._growth:
            self._growth.take(plan)
        self._map_for(self._models[plan.model], plan)

    def _earlier_chunks(self, plan: StepPlan) -> tuple[InFlight, ...]:
        shared = {sequence for sequence, _ in plan.items if sequence.in_flight > 1}
        if not shared:
            return ()
        under_way = (step for step in self._lanes if step is not None)
        return tuple(step for step in under_way if not shared.isdisjoint(sequence for sequence, _ in step.plan.items))

    def _advance(self, lane: int, step: InFlight) -> None:
        started_ns = time.monotonic_ns()
        model = step.model
        ffn_out = model.port.result(lane)
        step.layer += 1
        if step.layer < model.num_layers:
            cache = model.kv.layers[step.layer]
            step.hidden, ffn_in = model.half.attend(step.layer, step.hidden, ffn_out, cache, step.layout)
            self._send(started_ns, lane, step, ffn_in)
        else:
            self._finish(step, ffn_out)
            self._lanes[lane] = None
            step.after = ()  # else each chunk of a long prompt would keep alive what all before it computed
            self._account(started_ns, FINISH, lane, step)

    def _send(self, started_ns: int, lane: int, step: InFlight, rows: torch.Tensor) -> None:
        """Send `rows` on their way, at once: nothing else that this device could do would free the other one sooner."""
        model = step.model
        if self._transfers_apart and model.port.crosses:
            self._account(started_ns, ATTENTION, lane, step)
            started_ns = time.monotonic_ns()
            model.port.send(lane, model.ffn_index, step.layer, rows)
            self._account(started_ns, A2F, lane, step)
        else:
            model.port.send(lane, model.ffn_index, step.layer, rows)
            self._account(started_ns, ATTENTION, lane, step)

    def _account(self, started_ns: int, stage: int, lane: int, step: InFlight) -> None:
        ended_ns = time.monotonic_ns()
        if not self._shares_core:
            self._counters.add("busy_ns", ended_ns - started_ns)
        if self._recorder is not None:
            rows = step.hidden.shape[0]
            self._recorder.add(started_ns, ended_ns, stage, lane, step.model.index, step.layer, rows)

    def _finish(self, step: InFlight, ffn_out: torch.Tensor) -> None:
        sampled: list[int] = []
        if step.layout.logit_rows:
            sampled = step.model.half.logits(step.hidden, ffn_out, step.layout).argmax(dim=-1).tolist()
        self._tell(self._complete(step, sampled))

    def _complete(self, step: InFlight, sampled: list[int]) -> list[Produced]:
        """`step` has ended with these tokens; what its sequences have of it, which is to be told."""
        produced = self._scheduler.complete(step.plan, iter(sampled))
        for sequence, _, last in produced:
            if not last:
                continue
            if self._growth:
                self._growth.remove(sequence)
            step.model.kv.close_run(sequence.run)
        self._plan_mapping(step)
        return produced

    def _tell(self, produced: list[Produced]) -> None:
        """Report what a step produced."""
        now_ns = time.monotonic_ns()
        if any(last for _, _, last in produced):
            self._sample(now_ns)  # first: whoever is told that a request has ended is not to see its pages in use
        if produced:
            self._report(Tokens(now_ns, tuple((s.request_id, token, last) for s, token, last in produced)))
        if now_ns >= self._next_sample_ns:
            self._sample(now_ns)
        self._counters.add("steps", 1)
        self._counters.set("bytes_crossed", sum({id(m.port): m.port.bytes_crossed for m in self._models}.values()))

    # -- pages ---------------------------------------------------------------------------------------------------------
    def _map_for(self, model: HostedModel, plan: StepPlan) -> None:
        for (sequence, _), tokens in zip(plan.items, plan.kv_lens, strict=True):
            if tokens > sequence.run.mapped_tokens:
                grow_counted(model.kv, sequence.run, tokens, self._counters)

    def _plan_mapping(self, step: InFlight) -> None:
        if self._growth:
            return  # pages that are taken ahead of need would be missing where they are needed
        for sequence, _ in step.plan.items:
            wanted = min(len(sequence.tokens) + _MAP_AHEAD_TOKENS, sequence.most_cached)
            if sequence.run.mapped_tokens < wanted:
                self._map_ahead.append((step.model, sequence))

    def _map_one_ahead(self) -> bool:
        """Idle time spent on a sequence that will soon need pages, so that its own step need not map them."""
        if not self._map_ahead:
            return False
        model, sequence = self._map_ahead.popleft()
        if self._scheduler.holds(sequence):
            wanted = min(len(sequence.tokens) + _MAP_AHEAD_TOKENS, sequence.most_cached)
            self._counters.add("mapped_ahead", grow_counted(model.kv, sequence.run, wanted, self._counters))
        return True

    # -- reports -------------------------------------------------------------------------------------------------------
    def _sample(self, now_ns: int) -> None:
        self._next_sample_ns = now_ns + self._sample_interval_ns
        used = sum(
            sequence.cached * model.kv.geometry.token_bytes * model.num_layers
            for model in self._models
            for sequence in self._scheduler.sequences(model.index)
        )
        self._report(PoolUse(now_ns, tuple((name, pool.pages_by_model()) for name, pool in self._pools), used))

    def _report(self, message: Tokens | PoolUse | Preempted | Expired) -> None:
        data = encode(message)
        while not self._tokens.push(data):  # the host is behind; losing a token is no choice
            time.sleep(_LOOK_S)
