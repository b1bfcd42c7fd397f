"""Attention devices, FFN devices and the batches that go to and fro between them, event by event or many events at once.

A device does one stage at a time. An attention device that is free looks at its lanes in turn, as the real worker's loop
does; an FFN device serves rows in order of arrival. A step of 48 layers is 150 events, nearly all of them repetitions: the
lanes of a device soon fall into a pattern that recurs every few layers. So whenever the same situation (who waits, who
computes, and for how much longer) is met again and the layers to come are like those that lie between, the pipeline jumps
over as many recurrences as fit before anything else can happen. Times are whole nanoseconds: the jump is exact.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from serving.sim.clock import VirtualClock
from serving.sim.costs import ALONE, Neighbourly

_ATTENDED, _ARRIVED, _RETURNED, _FINISHED = range(4)
_NEVER = 1 << 62
_MOST_SITUATIONS = 16  # what has not recurred by then is not looked for any more, until a step begins or ends


class FFNDevice:
    """When it will be free, and how long it has computed."""

    __slots__ = ("busy_ns", "free_ns", "runs", "steps")

    def __init__(self) -> None:
        self.free_ns = self.busy_ns = self.steps = 0
        self.runs = ALONE


@dataclass(slots=True)
class Step:
    """What one step costs its devices. `route[layer]` numbers the entry of `jobs` that its FFN is: the devices and their
    nanoseconds. `alike(period)` says for each layer how many from it on equal the one `period` layers later. Without
    `jobs` the FFN lies on the attention device itself, and the whole step is one stage of `first_ns`."""

    payload: object
    first_ns: int
    attention_ns: int
    finish_ns: int
    layers: int
    cross_ns: int = 0
    crossed_bytes: int = 0  # a layer
    route: Sequence[int] = ()
    jobs: Sequence[tuple[tuple[FFNDevice, int], ...]] = ()
    alike: Callable[[int], Sequence[int]] | None = None
    attention_beside: Neighbourly = ALONE
    ffn_beside: Neighbourly = ALONE


class Lane:
    """A place for one in-flight batch. `event` and `due_ns` are what happens to it next; `waiting` that its rows are back."""

    __slots__ = ("device", "due_ns", "event", "layer", "number", "step", "waiting")

    def __init__(self, device: AttentionDevice) -> None:
        self.device = device
        self.step: Step | None = None
        self.layer = self.event = self.due_ns = self.number = 0
        self.waiting = False


@dataclass(eq=False)
class AttentionDevice:
    """`begin()` gives the next step or None; `complete(payload)` takes one that is done. `may_begin` is set by whoever adds
    a sequence: a device that had nothing to begin is not asked again before."""

    begin: Callable[[], Step | None]
    complete: Callable[[object], None]
    lanes: list[Lane] = field(default_factory=list)
    cursor: int = 0
    busy: bool = False
    may_begin: bool = False
    free_ns: int = 0
    runs: Neighbourly = ALONE
    busy_ns: int = 0
    crossed_bytes: int = 0


def alike_layers(signature: Sequence[object], period: int) -> list[int]:
    """For each layer, how many layers from it on have the signature of the layer `period` after them."""
    count = len(signature)
    runs = [0] * (count + 1)
    for layer in range(count - period - 1, -1, -1):
        runs[layer] = runs[layer + 1] + 1 if signature[layer] == signature[layer + period] else 0
    return runs


def sorted_by_due(lanes: Sequence[Lane]) -> tuple[int, ...]:
    """Positions of lanes in the order of what happens to them, those that wait first."""
    return tuple(
        sorted(range(len(lanes)), key=lambda i: (-1, i) if lanes[i].waiting else (lanes[i].due_ns, lanes[i].number))
    )


class Pipeline:
    """All devices of a backend between which rows cross; a source of the clock."""

    def __init__(self, clock: VirtualClock, coarse: bool = True) -> None:
        self._clock, self._coarse = clock, coarse
        self._events: list[tuple[int, int, Lane]] = []
        self._number = 0
        self._ffn_devices: list[FFNDevice] = []
        self._devices: list[AttentionDevice] = []
        self._seen: dict[tuple, tuple] = {}
        clock.attach(self)

    def add_ffn(self) -> FFNDevice:
        device = FFNDevice()
        self._ffn_devices.append(device)
        return device

    def add_attention(self, device: AttentionDevice, lanes: int) -> None:
        device.lanes = [Lane(device) for _ in range(lanes)]
        self._devices.append(device)

    def next_ns(self) -> int:
        return self._events[0][0] if self._events else _NEVER

    def submit(self, device: AttentionDevice) -> None:
        """A sequence was added to `device` now."""
        device.may_begin = True
        if not device.busy:
            now_ns = self._clock.now_ns()
            self._wake(device, now_ns, now_ns)

    def run(self, until_ns: int) -> None:
        """Events up to `until_ns`, or until there is news for the host."""
        events, clock = self._events, self._clock
        while events and events[0][0] <= until_ns and not clock.has_news:
            now_ns, _, lane = heapq.heappop(events)
            event, step, device = lane.event, lane.step, lane.device
            if event == _ARRIVED:
                end_ns = 0
                for worker, alone_ns in step.jobs[step.route[lane.layer]]:
                    job_ns = alone_ns
                    if step.ffn_beside is not ALONE:
                        job_ns += self._lost_ns(worker, max(worker.free_ns, now_ns), alone_ns, step.ffn_beside)
                        worker.runs = step.ffn_beside
                    done_ns = (max(now_ns, worker.free_ns)) + job_ns
                    worker.free_ns = done_ns
                    worker.busy_ns += job_ns
                    worker.steps += 1
                    end_ns = max(end_ns, done_ns)
                self._push(end_ns + step.cross_ns, _RETURNED, lane)
                continue
            if event == _RETURNED:
                lane.waiting = True
                if device.busy:
                    continue
            else:
                device.busy = False
                if event == _FINISHED:
                    lane.step = None
                    self._seen.clear()
                    device.may_begin = True
                    clock.set_ns(now_ns)
                    device.complete(step.payload)
                else:
                    device.crossed_bytes += step.crossed_bytes
                    self._push(now_ns + step.cross_ns, _ARRIVED, lane)
            self._wake(device, now_ns, until_ns)

    # -- inside --------------------------------------------------------------------------------------------------------
    def _push(self, due_ns: int, event: int, lane: Lane) -> None:
        self._number += 1
        lane.event, lane.due_ns, lane.number = event, due_ns, self._number
        heapq.heappush(self._events, (due_ns, self._number, lane))

    def _wake(self, device: AttentionDevice, now_ns: int, until_ns: int) -> None:
        """Start the next stage of the first lane, in turn, that has one."""
        lanes, count, cursor = device.lanes, len(device.lanes), device.cursor
        for offset in range(count):
            index = (cursor + offset) % count
            lane = lanes[index]
            if lane.step is None:
                step = device.begin() if device.may_begin else None
                if step is None:
                    device.may_begin = False
                    continue
                self._seen.clear()
                lane.step, lane.layer = step, 0
                stage_ns, event = step.first_ns, _ATTENDED if step.jobs else _FINISHED
            elif lane.waiting:
                step = lane.step
                lane.waiting = False
                lane.layer += 1
                last = lane.layer == step.layers
                stage_ns, event = (step.finish_ns, _FINISHED) if last else (step.attention_ns, _ATTENDED)
            else:
                continue
            if step.attention_beside is not ALONE:
                stage_ns += self._lost_ns(device, now_ns, stage_ns, step.attention_beside)
                device.runs = step.attention_beside
            device.busy = True
            device.busy_ns += stage_ns
            device.free_ns = now_ns + stage_ns
            device.cursor = index + 1
            self._push(now_ns + stage_ns, event, lane)
            if self._coarse and event == _ATTENDED and lane.layer:
                self._jump(device, lane, now_ns, until_ns)
            return

    def _lost_ns(self, own: AttentionDevice | FFNDevice, now_ns: int, stage_ns: int, runs: Neighbourly) -> int:
        """What a stage that begins now loses to a neighbour that runs already, and the neighbour to it: charged to the later
        of the two, because the end of the earlier one is settled. Stretching is by serving.cost.contention's rule."""
        lost = 0.0
        for other in (*self._devices, *self._ffn_devices):
            overlap_ns = min(other.free_ns - now_ns, stage_ns)
            if other is not own and overlap_ns > 0:
                mine = 1.0 + (runs.beside - 1.0) * other.runs.draws
                theirs = 1.0 + (other.runs.beside - 1.0) * runs.draws
                lost += overlap_ns * ((1.0 - 1.0 / mine) + (1.0 - 1.0 / theirs))
        return round(lost)

    def _jump(self, device: AttentionDevice, started: Lane, now_ns: int, until_ns: int) -> None:
        """Where the situation in which `started` begins a layer was met before, go on as many recurrences at once as fit."""
        if len(self._devices) > 1 or len(self._seen) >= _MOST_SITUATIONS:
            return
        active = [lane for lane in device.lanes if lane.step is not None]
        if started is not active[0]:
            return
        situation = (
            device.cursor,
            tuple(
                (lane.waiting, 0 if lane.waiting else lane.event, 0 if lane.waiting else lane.due_ns - now_ns)
                for lane in active
            ),
            sorted_by_due(active),
            tuple(max(worker.free_ns - now_ns, 0) for worker in self._ffn_devices),
            tuple(lane.step.route[lane.layer] for lane in active),
        )
        before = self._seen.get(situation)
        layers = tuple(lane.layer for lane in active)
        if before is None:
            counted = [(worker.busy_ns, worker.steps) for worker in self._ffn_devices]
            self._seen[situation] = (now_ns, layers, device.busy_ns, device.crossed_bytes, counted)
            return
        since_ns, since_layers, busy_ns, crossed, counted = before
        period_ns = now_ns - since_ns
        times = (until_ns - now_ns) // period_ns
        for lane, layer, since in zip(active, layers, since_layers, strict=True):
            period = layer - since
            if not period:
                return
            times = min(times, (lane.step.alike(period)[since] - 1) // period)
        if times < 1:
            return
        for lane, layer, since in zip(active, layers, since_layers, strict=True):
            lane.layer += times * (layer - since)
            lane.due_ns += times * period_ns
        self._events[:] = [(due_ns + times * period_ns, number, lane) for due_ns, number, lane in self._events]
        device.free_ns += times * period_ns
        device.busy_ns += times * (device.busy_ns - busy_ns)
        device.crossed_bytes += times * (device.crossed_bytes - crossed)
        for worker, (worker_ns, steps) in zip(self._ffn_devices, counted, strict=True):
            worker.free_ns += times * period_ns
            worker.busy_ns += times * (worker.busy_ns - worker_ns)
            worker.steps += times * (worker.steps - steps)
        self._seen.clear()
