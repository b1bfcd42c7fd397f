"""Lanes of steps in flight on cards: a source of the clock.

A lane has streams of its own for either side on every card (serving/cuda/lane.py), so nothing orders the lanes: a stage begins when
the one before it is done, whatever else is on its card, and stages that are there at once slow each other. A core does one stage at a
time instead (serving/sim/pipeline.py). Steps are begun and completed here, by the policies; the events
between are numbers that serving/sim/card_events.py works through.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from serving.cost.contention import demand
from serving.cost.engine_kernels import layer_kernels
from serving.cost.hardware import KINDS
from serving.cost.stages import NOTHING, ModelStages, Stage
from serving.parallel.costs import StepShape
from serving.scheduler import StepPlan
from serving.sim import card_events as events
from serving.sim.clock import VirtualClock
from serving.sim.costs import StageTimes
from serving.sim.route import Route
from serving.sim.workers import SimulatedModelWorker

_HEAD_KERNELS = 3  # last norm, LM head, the best of each row
_FIRST_ROOM = 256  # stages that a lane has room for at first


class Stages(NamedTuple):
    """The stages of a step in order: the place of each ([S], events.ON_THE_WAY for none) and its numbers ([S, events.STAGE_FIELDS])."""

    places: np.ndarray
    numbers: np.ndarray


class CardStep(NamedTuple):
    """A step in one lane: what it is to whoever completes it, of which kind (an index of hardware.KINDS), its stages, and the bytes
    that cross from side to side in all of it."""

    payload: object
    kind: int
    stages: Stages
    crossed_bytes: int


class CardLanes:
    """All lanes of a backend on cards, whose kernels wait for `waits[own kind][other kind]` of each other's. Devices are added before
    anything is submitted."""

    def __init__(self, clock: VirtualClock, waits: Mapping[str, Mapping[str, float]], compiled: bool = True) -> None:
        self._clock = clock
        self._begin_lane, self._advance = (compiled and events.compiled()) or (events.begin, events.advance)
        self._waits = np.array([[waits[own][other] for other in KINDS] for own in KINDS])
        self._lanes = np.zeros((0, events.LANE_FIELDS), np.int64)
        self._stage_places = np.zeros((0, _FIRST_ROOM), np.int64)
        self._stages = np.zeros((0, _FIRST_ROOM, events.STAGE_FIELDS))
        self._progress = np.ones((0, events.PROGRESS_FIELDS))
        self._devices = np.zeros((0, events.DEVICE_FIELDS), np.int64)
        self._known_places: dict[tuple[int, ...], int] = {}
        self._places = np.zeros((0, events.PLACE_FIELDS), np.int64)
        self._listed = np.zeros(0, np.int64)  # devices of all places
        self._times = np.array([0, events.NEVER], np.int64)
        self._attention: list[CardAttention] = []  # by lane
        self._steps: list[CardStep | None] = []  # by lane
        clock.attach(self)

    def add_ffn(self, memory: int) -> CardDevice:
        """A device that holds FFNs in the card of that number."""
        device = np.zeros((1, events.DEVICE_FIELDS), np.int64)
        device[0, events.CARD] = memory
        self._devices = np.concatenate([self._devices, device])
        return CardDevice(self, len(self._devices) - 1)

    def add_attention(
        self, begin: Callable[[], CardStep | None], complete: Callable[[object], None], lanes: int, memory: int
    ) -> CardAttention:
        """`begin()` gives the next step or None, and is not asked again before a sequence is submitted or a step ends;
        `complete(payload)` takes a step that is done."""
        first = len(self._lanes)
        device = CardAttention(self, self.add_ffn(memory).number, begin, complete, range(first, first + lanes))
        empty = np.zeros((lanes, events.LANE_FIELDS), np.int64)
        empty[:, events.AT] = events.NOBODY
        self._lanes = np.concatenate([self._lanes, empty])
        self._progress = np.concatenate([self._progress, np.ones((lanes, events.PROGRESS_FIELDS))])
        self._attention += [device] * lanes
        self._steps += [None] * lanes
        self._make_room(self._stages.shape[1])
        return device

    def place(self, *devices: int) -> int:
        """The number of the place that is all of `devices` at once."""
        if devices not in self._known_places:
            self._known_places[devices] = len(self._places)
            self._places = np.concatenate([self._places, [[len(self._listed), len(devices)]]])
            self._listed = np.concatenate([self._listed, np.array(devices, np.int64)])
        return self._known_places[devices]

    def next_ns(self) -> int:
        return int(self._times[events.NEXT_NS])

    def run(self, until_ns: int) -> None:
        """Events up to `until_ns`, or until there is news for the host."""
        while not self._clock.has_news:
            lane = self._advance(until_ns, *self._state)
            if lane == events.NOBODY:
                return
            self._clock.set_ns(int(self._times[events.SINCE_NS]))
            device, step, self._steps[lane] = self._attention[lane], self._steps[lane], None
            device.crossed_bytes += step.crossed_bytes
            device.complete(step.payload)
            self.fill(device)

    def fill(self, device: CardAttention) -> None:
        """Free lanes of `device` look for a step each, now."""
        for lane in device.lanes:
            if self._steps[lane] is None:
                step = device.begin()
                if step is None:
                    return
                self._load(lane, step)

    def _load(self, lane: int, step: CardStep) -> None:
        count = len(step.stages.places)
        if count > self._stages.shape[1]:
            self._make_room(2 * count)
        self._steps[lane] = step
        self._lanes[lane, events.STAGES], self._lanes[lane, events.KIND] = count, step.kind
        self._stage_places[lane, :count], self._stages[lane, :count] = step.stages
        self._begin_lane(lane, self._clock.now_ns(), *self._state)

    @property
    def _state(self) -> tuple[np.ndarray, ...]:
        where = self._places, self._listed, self._devices
        return self._lanes, self._stage_places, self._stages, self._progress, *where, self._waits, self._times

    def _make_room(self, stages: int) -> None:
        """For every lane and for steps of so many stages."""
        lanes, (had, room) = len(self._lanes), self._stage_places.shape
        grown = [np.zeros((lanes, stages), np.int64), np.zeros((lanes, stages, events.STAGE_FIELDS))]
        for new, old in zip(grown, (self._stage_places, self._stages), strict=True):
            new[:had, :room] = old
        self._stage_places, self._stages = grown

    def busy_ns(self, number: int) -> int:
        """For how long a stage of one lane at least was on the device of that number."""
        device = self._devices[number]
        running_ns = self._times[events.SINCE_NS] - device[events.BUSY_SINCE_NS] if device[events.HERE] else 0
        return int(device[events.BUSY_NS] + running_ns)

    def begun(self, number: int) -> int:
        """How many stages began there."""
        return int(self._devices[number, events.BEGUN])


@dataclass(frozen=True)
class CardDevice:
    """Memory on a card in which FFNs lie."""

    owner: CardLanes
    number: int

    @property
    def busy_ns(self) -> int:
        """With a stage of one lane at least."""
        return self.owner.busy_ns(self.number)

    @property
    def steps(self) -> int:
        return self.owner.begun(self.number)


@dataclass
class CardAttention:
    """Memory on a card in which KV and attention lie, and the lanes of those models."""

    owner: CardLanes
    number: int
    begin: Callable[[], CardStep | None]
    complete: Callable[[object], None]
    lanes: range
    crossed_bytes: int = 0

    @property
    def busy_ns(self) -> int:
        """With a stage of one lane at least."""
        return self.owner.busy_ns(self.number)

    def submit(self) -> None:
        """A sequence was added to it now."""
        self.owner.fill(self)


class CardLanesWorker(SimulatedModelWorker):
    """Drives lanes whose FFNs lie on this card and on others."""

    def _add_device(self, lanes: CardLanes, memory: int) -> CardAttention:
        self._known: dict[tuple, tuple[Stages, np.ndarray, int]] = {}
        self._card_lanes = lanes
        return lanes.add_attention(self._begin, self._complete, self._role.lanes, memory)

    def _step_of(self, plan: StepPlan) -> CardStep:
        times, route = self._times[plan.model], self._routes[plan.model]
        stages, shape, wanted = times.stages, StepShape.of(plan.query_lens, plan.kv_lens), len(plan.logit_rows)
        chunk_rows = tuple(new for new, _ in shape.chunks)
        key = (plan.model, shape.batch, chunk_rows, wanted)
        if key not in self._known:
            self._known[key] = self._frame(times, route, shape.batch, chunk_rows, wanted)
        frame, own, kernels = self._known[key]
        attention = stages.mixed_attention(shape.batch, shape.context_tokens, shape.chunks)
        numbers = frame.numbers.copy()
        numbers[own] = _numbers(stages, attention, kernels)
        numbers[own[0], events.ALONE_NS] += times.embedding_ns(shape.rows)
        if route is not None:
            numbers[own[1:], events.ALONE_NS] += times.sum_ns(shape.rows, route.parts)
        crossed = 0 if route is None else stages.spec.num_layers * 2 * shape.rows * route.row_bytes
        return CardStep((plan, wanted), int(bool(chunk_rows)), Stages(frame.places, numbers), crossed)

    def _frame(
        self, times: StageTimes, route: Route | None, batch: int, chunk_rows: tuple[int, ...], wanted: int
    ) -> tuple[Stages, np.ndarray, int]:
        """What steps of such rows share: their stages, with room for attention, which of them that is, and its kernels."""
        stages, mine = times.stages, self._card_lanes.place(self._device.number)
        passes, rows = stages.passes(batch, chunk_rows), batch + sum(chunk_rows)
        cross_ns = 0 if route is None else route.one_way_ns(stages, rows)
        ways = [(events.ON_THE_WAY, np.array([float(cross_ns), 1.0, 0.0, 0.0]))] if cross_ns else []
        room = (mine, np.zeros(events.STAGE_FIELDS))
        found: list[tuple[int, np.ndarray]] = []
        own: list[int] = []
        for layer in range(stages.spec.num_layers):
            place, parts = (mine, [times.stages]) if route is None else self._ffn_parts(route, layer)
            attention_kernels, kernels = layer_kernels(stages.spec, layer, batch, chunk_rows)
            parts = [_numbers(part, _ffn(part, layer, passes), kernels) for part in parts]
            own.append(len(found))
            found += [room, *ways, (place, max(parts, key=lambda part: part[events.ALONE_NS])), *ways]
        head = _numbers(stages, stages.head(wanted) if wanted else NOTHING, _HEAD_KERNELS)
        head[events.ALONE_NS] += times.sum_ns(rows, route.parts) if route is not None else 0
        if head[events.ALONE_NS]:
            head[events.KERNEL_NS] = max(head[events.KERNEL_NS], 1.0)
            found.append((mine, head))
        places, numbers = zip(*found, strict=True)
        return Stages(np.array(places, np.int64), np.array(numbers)), np.array(own), attention_kernels

    def _ffn_parts(self, route: Route, layer: int) -> tuple[int, list[ModelStages]]:
        """Where the FFN of `layer` lies, and what its parts there cost."""
        legs = route.legs[layer]
        place = self._card_lanes.place(*(worker.device.number for worker, _ in legs))
        return place, [worker.times[index].stages for worker, index in legs]


def _ffn(stages: ModelStages, layer: int, passes: tuple[int, ...]) -> Stage:
    """One layer's FFN, of all passes of a step."""
    return sum((stages.ffn(layer, each) for each in passes), NOTHING)


def _numbers(stages: ModelStages, stage: Stage, kernels: int) -> np.ndarray:
    """A stage as the event loop knows it ([events.STAGE_FIELDS])."""
    seconds, hardware = stages.launched_s(stage), stages.hardware
    bandwidth = demand(stage.work.bytes, seconds, hardware.memory_bandwidth)
    compute = demand(stage.work.flops, seconds, hardware.flops(stages.dtype))
    return np.array([seconds * 1e9, seconds * 1e9 / kernels, bandwidth, compute])
