"""Workers that take time instead of computing. They run the scheduler of the real ones and answer to the same host.

When their stages run and for how long is the pipeline's business (serving/sim/pipeline.py); here steps are composed, costed,
completed and reported.
"""

from __future__ import annotations

import random
from collections.abc import Callable

from serving.growth import CountedPages, preempting_growth
from serving.memory.kv_pool import KVGeometry
from serving.pausing import growth_of
from serving.scheduler import StepPlan, StepScheduler
from serving.sequence import Sequence as LiveSequence
from serving.sim.clock import VirtualClock
from serving.sim.costs import StageTimes
from serving.sim.leaps import LONGEST_STEPS, Leap
from serving.sim.pipeline import AttentionDevice, FFNDevice, Pipeline, Step
from serving.sim.route import Route
from serving.workers.config import FFNWorkerConfig, ModelWorkerConfig
from serving.workers.messages import Cancel, PoolUse, Preempted, Stop, Submit, Tokens

SIMULATED_TOKEN = 0  # what every simulated step generates; lengths are what the request asks for


class Outbox(list):
    """What a worker has to say, and to whom it matters when: the end of a sequence lets the host admit another."""

    def __init__(self, clock: VirtualClock) -> None:
        super().__init__()
        self._clock = clock

    def append(self, message: Tokens | PoolUse) -> None:
        super().append(message)
        if not isinstance(message, PoolUse) and not (
            isinstance(message, Tokens) and not any(last for _, _, last in message.items)
        ):
            self._clock.has_news = True

    def append_tokens(self, message: Tokens) -> None:
        """The same for tokens of which none is the last: no news for the host."""
        super().append(message)


class SimulatedWorker:
    """What both kinds share: a device that is busy or free, counters, and the host's end of the conversation."""

    def __init__(self, name: str, clock: VirtualClock) -> None:
        self.name = name
        self._clock = clock
        self._busy = False
        self._counters = {"busy_ns": 0, "bytes_crossed": 0, "steps": 0, "preemptions": 0}
        self._outbox = Outbox(clock)

    def wait_ready(self, deadline_s: float) -> None:
        pass

    def check(self) -> None:
        pass

    def send(self, message: Submit | Cancel | Stop) -> None:
        pass

    def receive(self) -> list[Tokens | PoolUse]:
        messages = list(self._outbox)
        self._outbox.clear()
        return messages

    def read_counters(self) -> dict[str, int]:
        return dict(self._counters)

    def stop(self) -> None:
        pass

    def _occupy(self, seconds: float, then: Callable[[], None]) -> None:
        """Be busy for `seconds`, then do `then` and look for more."""
        self._busy = True
        self._counters["busy_ns"] += round(seconds * 1e9)

        def done() -> None:
            self._busy = False
            then()
            self._wake()

        self._clock.after(seconds, done)

    def _wake(self) -> None:
        raise NotImplementedError


class SimulatedRelay(SimulatedWorker):
    """Under host-driven control the relay's time is part of every crossing; the process itself does nothing here."""

    def _wake(self) -> None:
        pass


class SimulatedFFNWorker(SimulatedWorker):
    """Serves rows in order of arrival."""

    def __init__(
        self,
        name: str,
        clock: VirtualClock,
        role: FFNWorkerConfig,
        times: list[StageTimes],
        device: FFNDevice,
        memory: int,
    ) -> None:
        super().__init__(name, clock)
        self.node, self.device, self.memory = role.device.node, device, memory
        self.times = times

    def read_counters(self) -> dict[str, int]:
        return {**self._counters, "busy_ns": self.device.busy_ns, "steps": self.device.steps}


class SimulatedModelWorker(SimulatedWorker):
    """Attention halves over pools of pages, with the FFN in place or behind a link."""

    def __init__(
        self,
        name: str,
        clock: VirtualClock,
        role: ModelWorkerConfig,
        times: list[StageTimes],
        ffn_workers: list[SimulatedFFNWorker],
        pipeline: Pipeline,
        prefill: bool = True,
        memory: int = 0,
    ) -> None:
        super().__init__(name, clock)
        self._role, self._times = role, times
        self._prefill = prefill
        self._scheduler = StepScheduler(
            len(role.models), role.limits, role.profiles, role.prefill_first, role.chunks_in_flight
        )
        preempts = role.growth == "preempt"
        self._growth = preempting_growth(role, CountedPages(role.pools[0].num_pages)) if preempts else growth_of(role)
        self._geometries = [KVGeometry.of(model.spec, model.dtype) for model in role.models]
        self._page_bytes = {index: pool.page_bytes for pool in role.pools for index in pool.models}
        self._pages = [0] * len(role.models)
        self._held: dict[int, tuple[int, int]] = {}  # request id -> model, pages
        self._next_sample_ns = 0
        self._routes = [Route.of(role, index, ffn_workers, pipeline) for index in range(len(role.models))]
        self._device = self._add_device(pipeline, memory)
        # Whether nobody else has a say in when a step that is one stage ends, and what comes after it.
        self._leaps = role.lanes == 1 and all(one.alone for one in times)
        self._leap: Leap | None = None  # the steps under way where they are more than one
        self._random = random.Random(name)

    def _add_device(self, pipeline: Pipeline, memory: int) -> AttentionDevice:
        """What the worker's lanes run on."""
        return pipeline.add_attention(self._begin, self._complete, self._role.lanes, memory)

    def send(self, message: Submit | Cancel | Stop) -> None:
        self._end_leap()
        if isinstance(message, Submit):
            prompt = list(message.prompt)
            sequence = LiveSequence(message.request_id, message.model, prompt, len(prompt), message.max_new_tokens)
            if not self._prefill:
                sequence.cached = len(prompt) - 1
            self._scheduler.add(sequence)
            if self._growth:
                self._growth.add(sequence)
            self._device.submit()
        elif isinstance(message, Cancel):
            self._scheduler.cancel(message.request_id, message.model)

    def receive(self) -> list[Tokens | PoolUse]:
        self._tell()
        return super().receive()

    def read_counters(self) -> dict[str, int]:
        self._end_leap()  # for what it has not reached yet
        device = self._device
        return {**self._counters, "busy_ns": device.busy_ns, "bytes_crossed": device.crossed_bytes}

    # -- the life of a step --------------------------------------------------------------------------------------------
    def _begin(self) -> Step | None:
        plan = self._next_plan()
        return None if plan is None else self._step_of(plan)

    def _next_plan(self) -> StepPlan | None:
        """The step to begin next, its pages taken; None where nobody may step."""
        plan = self._scheduler.next_step(self._growth and self._growth.may_step(self._clock.now_ns() / 1e9))
        if self._growth:
            self._report_preempted(self._growth.take_preempted())
        if plan is None:
            return None
        if self._growth:
            self._growth.take(plan)
        self._grow(plan)
        return plan

    def _step_of(self, plan: StepPlan) -> Step:
        """What `plan` costs the devices."""
        times, layers = self._times[plan.model], self._role.models[plan.model].spec.num_layers
        query_lens = plan.query_lens
        rows, wanted = sum(query_lens), len(plan.logit_rows)
        attention_ns, passes = times.attention_ns(query_lens, plan.kv_lens), times.passes(query_lens)
        factor, ffn_factor = times.factor(self._random), times.factor(self._random)
        route = self._routes[plan.model]
        if route is None:
            whole_ns = round(times.whole_ns(rows, passes, wanted, attention_ns) * factor)
            if self._leaps:
                return Step((plan, wanted), self._leap_ns(plan, whole_ns), 0, 0, layers)
            beside = times.whole_beside(passes, attention_ns)
            return Step((plan, wanted), whole_ns, 0, 0, layers, attention_beside=beside)
        sum_ns = times.sum_ns(rows, route.parts)
        inline_ns = route.inline_ns(times.stages, rows)
        begin_ns, end_ns = times.embedding_ns(rows), times.head_ns(wanted)
        return Step(
            (plan, wanted),
            first_ns=round((begin_ns + attention_ns) * factor) + inline_ns,
            attention_ns=round(attention_ns * factor) + sum_ns + inline_ns,
            finish_ns=round(end_ns * factor) + sum_ns,
            layers=layers,
            cross_ns=route.cross_ns(times.stages, rows),
            crossed_bytes=2 * rows * route.row_bytes,
            route=route.kept,
            jobs=route.jobs(times.stages, rows, passes, ffn_factor),
            attention_beside=times.attention_beside,
            ffn_beside=times.ffn_beside,
        )

    def _complete(self, payload: tuple[StepPlan, int]) -> None:
        plan, wanted = payload
        if self._leap is not None:
            plan = self._land()
        produced = self._scheduler.complete(plan, iter([SIMULATED_TOKEN] * wanted))
        ended = [sequence for sequence, _, last in produced if last]
        for sequence in ended:
            self._pages[sequence.model] -= self._held.pop(sequence.request_id)[1]
            if self._growth:
                self._growth.remove(sequence)
        now_ns = self._clock.now_ns()
        self._counters["steps"] += 1
        if produced:
            tell = self._outbox.append if ended else self._outbox.append_tokens
            tell(Tokens(now_ns, tuple([(s.request_id, token, last) for s, token, last in produced])))
        if ended or now_ns >= self._next_sample_ns:
            self._sample(now_ns)

    def _report_preempted(self, request_ids: tuple[int, ...]) -> None:
        if not request_ids:
            return
        for request_id in request_ids:
            model, pages = self._held.pop(request_id, (0, 0))
            self._pages[model] -= pages
        self._counters["preemptions"] += len(request_ids)
        self._outbox.append(Preempted(self._clock.now_ns(), request_ids))

    # -- steps that repeat ---------------------------------------------------------------------------------------------
    def _leap_ns(self, plan: StepPlan, first_ns: int) -> int:
        """Nanoseconds of the step `plan`, which takes `first_ns`, and of those that are sure to repeat it."""
        further = min(self._scheduler.repeats(plan), LONGEST_STEPS - 1)
        if self._growth:  # it is asked for every page
            further = min(further, *self._tokens_left(plan))
        if further < 1:
            return first_ns
        batch, times, first = len(plan.items), self._times[plan.model], sum(plan.kv_lens)
        contexts = range(first + batch, first + further * batch + 1, batch)
        passes = times.passes((1,) * batch)
        later_ns = (
            times.whole_ns(batch, passes, batch, times.decode_attention_ns(batch, tokens)) for tokens in contexts
        )
        told = tuple((sequence.request_id, SIMULATED_TOKEN, False) for sequence, _ in plan.items)
        now_ns = self._clock.now_ns()
        self._leap = Leap.of(plan, now_ns, (first_ns, *later_ns), told)
        return self._leap.end_ns - now_ns

    def _tokens_left(self, plan: StepPlan) -> list[int]:
        """How many more tokens of each sequence the pages hold that it needs for the step."""
        geometry, page_bytes = self._geometries[plan.model], self._page_bytes[plan.model]
        return [geometry.tokens_in(geometry.pages(tokens, page_bytes), page_bytes) - tokens for tokens in plan.kv_lens]

    def _tell(self) -> None:
        """Do what steps of the leap that are over did at their ends, and those that followed them at their beginnings."""
        leap = self._leap
        if leap is None:
            return
        further, ends_ns = leap.done, leap.over(self._clock.now_ns())
        for ended_ns in ends_ns:
            self._outbox.append_tokens(Tokens(ended_ns, leap.told))
            if ended_ns >= self._next_sample_ns:
                self._grow(leap.plan, further)
                self._sample(ended_ns)
            if self._growth:
                self._growth.repeat(ended_ns / 1e9)
            further += 1
        self._counters["steps"] += len(ends_ns)

    def _end_leap(self) -> None:
        """Somebody came or goes: what follows the step under way may be another one."""
        if self._leap is not None:
            self._tell()
            self._leap.cut()
            self._device.end_earlier(self._leap.end_ns)

    def _land(self) -> StepPlan:
        """The last step of the leap, which is over, those before it written into the sequences."""
        self._tell()
        leap, self._leap = self._leap, None
        plan = self._scheduler.repeat(leap.plan, leap.done, SIMULATED_TOKEN)
        self._grow(plan)
        return plan

    # -- pages ---------------------------------------------------------------------------------------------------------
    def _grow(self, plan: StepPlan, further: int = 0) -> None:
        """Hold the pages of what `plan` has in the cache once it is done, and of `further` tokens of each sequence."""
        geometry, page_bytes = self._geometries[plan.model], self._page_bytes[plan.model]
        for (sequence, _), tokens in zip(plan.items, plan.kv_lens, strict=True):
            pages = geometry.pages(tokens + further, page_bytes)
            held = self._held.get(sequence.request_id, (0, 0))[1]
            if pages > held:
                self._held[sequence.request_id] = (plan.model, pages)
                self._pages[plan.model] += pages - held

    def _sample(self, now_ns: int) -> None:
        self._next_sample_ns = now_ns + round(self._role.sample_interval_ms * 1e6)
        pools = tuple(
            (pool.name, {self._role.models[index].name: self._pages[index] for index in pool.models})
            for pool in self._role.pools
        )
        self._outbox.append(PoolUse(now_ns, pools))
