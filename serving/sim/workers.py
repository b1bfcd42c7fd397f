"""Workers that take time instead of computing. They run the scheduler of the real ones and answer to the same host.

A device does one stage at a time. A lane's rows travel to the FFN worker and back with the cost of a crossing each way; a
worker that is free looks at its lanes in turn, as the real worker's loop does.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from serving.cost.stages import ModelStages
from serving.cost.transfers import crossing
from serving.memory.kv_pool import KVGeometry
from serving.scheduler import StepPlan, StepScheduler
from serving.sequence import Sequence
from serving.sim.clock import VirtualClock
from serving.spec import element_bytes
from serving.workers.config import FFNWorkerConfig, ModelWorkerConfig, RelayConfig
from serving.workers.messages import PoolUse, Stop, Submit, Tokens

SIMULATED_TOKEN = 0  # what every simulated step generates; lengths are what the request asks for


@dataclass(slots=True)
class _Lane:
    """One in-flight batch: its step, its layer, how many FFN parts still compute, and whether its rows are back."""

    index: int
    plan: StepPlan
    layer: int = 0
    returned: bool = False
    unanswered: int = 0
    parts: int = 1  # that the FFN of the layer before came back in


class SimulatedWorker:
    """What both kinds share: a device that is busy or free, counters, and the host's end of the conversation."""

    def __init__(self, name: str, clock: VirtualClock) -> None:
        self.name = name
        self._clock = clock
        self._busy = False
        self._counters = {"busy_ns": 0, "bytes_crossed": 0, "steps": 0}
        self._outbox: list[Tokens | PoolUse] = []

    def wait_ready(self, deadline_s: float) -> None:
        pass

    def check(self) -> None:
        pass

    def send(self, message: Submit | Stop) -> None:
        pass

    def receive(self) -> list[Tokens | PoolUse]:
        messages, self._outbox = self._outbox, []
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

    def __init__(self, name: str, clock: VirtualClock, role: FFNWorkerConfig, stages: list[ModelStages]) -> None:
        super().__init__(name, clock)
        self.node = role.device.node
        self._stages = stages
        self._queue: deque[tuple[int, int, int, Callable[[], None]]] = deque()

    def take(self, model: int, layer: int, rows: int, answer: Callable[[], None]) -> None:
        """Rows have arrived; `answer` is called when they are done."""
        self._queue.append((model, layer, rows, answer))
        self._wake()

    def _wake(self) -> None:
        if self._busy or not self._queue:
            return
        model, layer, rows, answer = self._queue.popleft()
        stages = self._stages[model]
        self._counters["steps"] += 1
        self._occupy(stages.launched_s(stages.ffn(layer, rows)), answer)


class SimulatedModelWorker(SimulatedWorker):
    """Attention halves over pools of pages, with the FFN in place or behind a link."""

    def __init__(
        self,
        name: str,
        clock: VirtualClock,
        role: ModelWorkerConfig,
        stages: list[ModelStages],
        ffn_workers: list[SimulatedFFNWorker],
    ) -> None:
        super().__init__(name, clock)
        self._role, self._stages, self._ffn_workers = role, stages, ffn_workers
        self._scheduler = StepScheduler(len(role.models), role.limits)
        self._lanes: list[_Lane | None] = [None] * role.lanes
        self._cursor = 0
        self._geometries = [KVGeometry.of(model.spec, model.dtype) for model in role.models]
        self._page_bytes = {index: pool.page_bytes for pool in role.pools for index in pool.models}
        self._pages = [0] * len(role.models)
        self._held: dict[int, int] = {}  # request id -> pages
        self._next_sample_ns = 0

    def send(self, message: Submit | Stop) -> None:
        if isinstance(message, Submit):
            prompt = list(message.prompt)
            self._scheduler.add(
                Sequence(message.request_id, message.model, prompt, len(prompt), message.max_new_tokens)
            )
            self._wake()

    # -- the life of a step --------------------------------------------------------------------------------------------
    def _wake(self) -> None:
        """Start the next stage of the first lane, in turn, that has one."""
        count = len(self._lanes)
        for offset in range(count):
            if self._busy:
                return
            index = (self._cursor + offset) % count
            lane = self._lanes[index]
            if lane is None:
                plan = self._scheduler.next_step()
                if plan is None:
                    continue
                lane = self._lanes[index] = _Lane(index, plan)
                self._grow(plan)
                self._attend(lane, first=True)
            elif lane.returned:
                lane.returned = False
                lane.layer += 1
                if lane.layer < self._role.models[lane.plan.model].spec.num_layers:
                    self._attend(lane, first=False)
                else:
                    self._finish(lane)
            else:
                continue
            self._cursor = index + 1
            return

    def _attend(self, lane: _Lane, first: bool) -> None:
        plan, stages = lane.plan, self._stages[lane.plan.model]
        pairs = list(zip(plan.query_lens, plan.kv_lens, strict=True))
        decoding = [length for rows, length in pairs if rows == 1]
        chunks = [(rows, length - rows) for rows, length in pairs if rows > 1]
        stage = stages.mixed_attention(len(decoding), sum(decoding), chunks)
        seconds = stages.launched_s(stage)
        rows = sum(plan.query_lens)
        if lane.parts > 1:
            seconds += stages.launched_s(stages.partial_sum(rows, lane.parts))
        if first:
            seconds += stages.launched_s(stages.embedding(rows))
        if self._role.ffn_ports[plan.model] < 0:
            seconds += stages.launched_s(stages.ffn(lane.layer, rows))
            self._occupy(seconds, lambda: setattr(lane, "returned", True))
        else:
            self._occupy(seconds, lambda: self._cross(lane, rows))

    def _cross(self, lane: _Lane, rows: int) -> None:
        model, layer = lane.plan.model, lane.layer
        served = self._role.models[model]
        spread = self._role.ffn_legs.get(model)
        legs = spread[layer] if spread else ((self._role.ffn_ports[model], self._role.ffn_indices[model]),)
        message_bytes = len(legs) * rows * served.spec.hidden_size * element_bytes(served.dtype)
        lowered = self._role.mailboxes[legs[0][0]].bells is None
        # the legs' rows share this device's link, both ways, so the last of them is there after all of them
        nodes = {self._ffn_workers[port].node for port, _ in legs}
        same_node = nodes == {self._role.device.node}
        one_way_s = crossing(self._stages[model].hardware, message_bytes, lowered, same_node).latency_s
        self._counters["bytes_crossed"] += 2 * message_bytes
        lane.unanswered = lane.parts = len(legs)

        def answered() -> None:
            lane.unanswered -= 1
            if not lane.unanswered:
                lane.returned = True
                self._wake()

        def arrived() -> None:
            for port, number in legs:
                self._ffn_workers[port].take(number, layer, rows, lambda: self._clock.after(one_way_s, answered))

        self._clock.after(one_way_s, arrived)

    def _finish(self, lane: _Lane) -> None:
        stages = self._stages[lane.plan.model]
        wanted = len(lane.plan.logit_rows)
        seconds = stages.launched_s(stages.head(wanted)) if wanted else 0.0
        if lane.parts > 1:
            seconds += stages.launched_s(stages.partial_sum(sum(lane.plan.query_lens), lane.parts))
        self._occupy(seconds, lambda: self._complete(lane, wanted))

    def _complete(self, lane: _Lane, wanted: int) -> None:
        self._lanes[lane.index] = None
        produced = self._scheduler.complete(lane.plan, iter([SIMULATED_TOKEN] * wanted))
        ended = [sequence for sequence, _, last in produced if last]
        for sequence in ended:
            self._pages[sequence.model] -= self._held.pop(sequence.request_id)
        now_ns = self._clock.now_ns()
        self._counters["steps"] += 1
        if produced:
            self._outbox.append(Tokens(now_ns, tuple((s.request_id, token, last) for s, token, last in produced)))
        if ended or now_ns >= self._next_sample_ns:
            self._sample(now_ns)

    # -- pages ---------------------------------------------------------------------------------------------------------
    def _grow(self, plan: StepPlan) -> None:
        for sequence, rows in plan.items:
            pages = self._geometries[plan.model].pages(sequence.cached + rows, self._page_bytes[plan.model])
            held = self._held.get(sequence.request_id, 0)
            self._held[sequence.request_id] = max(pages, held)
            self._pages[plan.model] += max(pages - held, 0)

    def _sample(self, now_ns: int) -> None:
        self._next_sample_ns = now_ns + round(self._role.sample_interval_ms * 1e6)
        pools = tuple(
            (pool.name, {self._role.models[index].name: self._pages[index] for index in pool.models})
            for pool in self._role.pools
        )
        self._outbox.append(PoolUse(now_ns, pools))


def simulated_worker(
    name: str,
    clock: VirtualClock,
    role: ModelWorkerConfig | FFNWorkerConfig | RelayConfig,
    stages: list[ModelStages],
    ffn_workers: list[SimulatedFFNWorker],
) -> SimulatedWorker:
    """The worker that carries out `role`."""
    if isinstance(role, ModelWorkerConfig):
        return SimulatedModelWorker(name, clock, role, stages, ffn_workers)
    if isinstance(role, FFNWorkerConfig):
        return SimulatedFFNWorker(name, clock, role, stages)
    return SimulatedRelay(name, clock)
