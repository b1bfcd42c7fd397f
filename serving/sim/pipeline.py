"""Attention devices, FFN devices and the batches that go to and fro between them: a source of the clock.

A device does one stage at a time. An attention device that is free looks at its lanes in turn, as the real worker's loop
does; an FFN device serves rows in order of arrival. Steps are begun and completed here, by the policies; the events between
are numbers that serving/sim/events.py works through. Times are whole nanoseconds: compiled or not, they are the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from serving.sim import events
from serving.sim.clock import VirtualClock
from serving.sim.costs import ALONE, Neighbourly

_NOBODY = -1
_NO_EVENT_NS = -1  # a limit before everything that can happen


class Step(NamedTuple):
    """What one step costs its devices. `route` and `jobs` are what `Pipeline.keep_route` and `keep_jobs` gave for the FFN of
    each layer. Without them the FFN lies on the attention device itself, and the whole step is one stage of `first_ns`."""

    payload: object
    first_ns: int
    attention_ns: int
    finish_ns: int
    layers: int
    cross_ns: int = 0
    crossed_bytes: int = 0  # a layer
    route: int = -1
    jobs: int = -1
    attention_beside: Neighbourly = ALONE
    ffn_beside: Neighbourly = ALONE


class Pipeline:
    """All devices of a backend between which rows cross. Devices are added before anything is submitted."""

    def __init__(self, clock: VirtualClock, compiled: bool = True) -> None:
        self._clock = clock
        self._advance = (events.compiled() if compiled else None) or events.advance
        self._flat = _as_list if self._advance is events.advance else _as_array
        self._lanes, self._devices, self._ffns = self._flat([], int), self._flat([], int), self._flat([], int)
        self._lane_runs, self._device_runs, self._ffn_runs = (self._flat([], float) for _ in range(3))
        self._counters = self._flat([0, events.NEVER], int)
        self._table: list[int] = []
        self._read_table = self._flat([], int)
        self._begin: list[Callable[[], Step | None]] = []  # by device
        self._complete: list[Callable[[object], None]] = []
        self._payloads: list[object] = []  # by lane
        self._device_of: list[int] = []  # by lane
        clock.attach(self)

    def add_ffn(self, memory: int = 0) -> FFNDevice:
        """Of those that draw on the `memory` of that number."""
        ffn = [0] * events.FFN_FIELDS
        ffn[events.FFN_MEMORY] = memory
        self._ffns = self._flat([*self._ffns, *ffn], int)
        self._ffn_runs = self._flat([*self._ffn_runs, ALONE.beside, ALONE.draws], float)
        return FFNDevice(self, len(self._ffns) // events.FFN_FIELDS - 1)

    def add_attention(
        self, begin: Callable[[], Step | None], complete: Callable[[object], None], lanes: int, memory: int = 0
    ) -> AttentionDevice:
        """`begin()` gives the next step or None, and is not asked again before a sequence is submitted or a step ends;
        `complete(payload)` takes a step that is done. `memory` as for :meth:`add_ffn`."""
        number = len(self._begin)
        self._begin.append(begin)
        self._complete.append(complete)
        device = [0] * events.DEVICE_FIELDS
        device[events.FIRST_LANE], device[events.LANES], device[events.MEMORY] = len(self._payloads), lanes, memory
        lane = [0] * events.LANE_FIELDS
        lane[events.DEVICE] = number
        self._payloads += [None] * lanes
        self._device_of += [number] * lanes
        self._devices = self._flat([*self._devices, *device], int)
        self._lanes = self._flat([*self._lanes, *lane * lanes], int)
        self._device_runs = self._flat([*self._device_runs, ALONE.beside, ALONE.draws], float)
        self._lane_runs = self._flat([*self._lane_runs, *[0.0] * (2 * events.PAIR * lanes)], float)
        return AttentionDevice(self, number)

    def keep_route(self, kinds: Sequence[int]) -> int:
        """Remember of which kind the FFN of each layer is: an entry of the jobs."""
        return self._keep(kinds)

    def keep_jobs(self, jobs: Iterable[Sequence[tuple[FFNDevice, int]]]) -> int:
        """Remember, kind by kind, what one FFN layer asks of which devices: nanoseconds each."""
        entries = []
        for kind in jobs:
            pairs = [number for device, job_ns in kind for number in (device.number, job_ns)]
            entries.append(self._keep([len(kind), *pairs]))
        return self._keep(entries)

    def next_ns(self) -> int:
        return int(self._counters[events.NEXT_NS])

    def submit(self, device: AttentionDevice) -> None:
        """A sequence was added to `device` now."""
        self._devices[device.number * events.DEVICE_FIELDS + events.ASKS] = 1
        if not self._devices[device.number * events.DEVICE_FIELDS + events.BUSY]:
            self._drive(_NO_EVENT_NS, device.number, self._clock.now_ns())

    def end_earlier(self, device: AttentionDevice, end_ns: int) -> None:
        """The step of `device`, under way as one stage in its only lane, ends at `end_ns` instead of later."""
        record = device.number * events.DEVICE_FIELDS
        lane = self._devices[record + events.FIRST_LANE] * events.LANE_FIELDS
        self._devices[record + events.BUSY_NS] -= self._lanes[lane + events.DUE] - end_ns
        self._devices[record + events.FREE_NS] = self._lanes[lane + events.DUE] = end_ns
        self._counters[events.NEXT_NS] = min(self._counters[events.NEXT_NS], end_ns)

    def run(self, until_ns: int) -> None:
        """Events up to `until_ns`, or until there is news for the host."""
        if not self._clock.has_news:
            self._drive(until_ns, _NOBODY, 0)

    def read_device(self, number: int, field: int) -> int:
        return int(self._devices[number * events.DEVICE_FIELDS + field])

    def read_ffn(self, number: int, field: int) -> int:
        return int(self._ffns[number * events.FFN_FIELDS + field])

    # -- inside --------------------------------------------------------------------------------------------------------
    def _drive(self, until_ns: int, wakes: int, now_ns: int) -> None:
        """Let the event loop run, and answer wherever it asks."""
        while True:
            why, lane, now_ns = self._advance(
                until_ns,
                wakes,
                now_ns,
                self._lanes,
                self._lane_runs,
                self._devices,
                self._device_runs,
                self._ffns,
                self._ffn_runs,
                self._read_table,
                self._counters,
            )
            if why == events.IDLE:
                return
            wakes = self._device_of[lane]
            if why == events.MAY_BEGIN:
                step = self._begin[wakes]()
                if step is None:
                    self._devices[wakes * events.DEVICE_FIELDS + events.ASKS] = 0
                else:
                    self._load(lane, step)
                continue
            self._devices[wakes * events.DEVICE_FIELDS + events.ASKS] = 1
            self._clock.set_ns(now_ns)
            payload, self._payloads[lane] = self._payloads[lane], None
            self._complete[wakes](payload)
            if self._clock.has_news:
                until_ns = _NO_EVENT_NS

    def _load(self, lane: int, step: Step) -> None:
        """Give `lane` a step to begin."""
        self._payloads[lane] = step.payload
        minds, ffn_minds = step.attention_beside is not ALONE, step.ffn_beside is not ALONE
        record = lane * events.LANE_FIELDS
        self._lanes[record + events.STATE : record + events.LANE_FIELDS] = (
            events.BEGUN,
            step.first_ns,
            step.attention_ns,
            step.finish_ns,
            step.layers,
            step.cross_ns,
            step.crossed_bytes,
            step.route,
            step.jobs,
            minds,
            ffn_minds,
        )
        if minds or ffn_minds:
            mine, ffn, pairs = step.attention_beside, step.ffn_beside, 2 * events.PAIR
            self._lane_runs[lane * pairs : (lane + 1) * pairs] = mine.beside, mine.draws, ffn.beside, ffn.draws

    def _keep(self, numbers: Sequence[int]) -> int:
        """Put `numbers` into the table; where they stand there."""
        at = len(self._table)
        self._table += numbers
        if len(self._table) > len(self._read_table):
            self._read_table = self._flat(self._table + [0] * len(self._table), int)  # room to grow
        self._read_table[at : len(self._table)] = numbers
        return at


def _as_array(values: Sequence[int | float], kind: type) -> np.ndarray:
    return np.array(values, dtype=np.int64 if kind is int else np.float64)


def _as_list(values: Sequence[int | float], kind: type) -> list[int | float]:
    return list(values)


@dataclass(frozen=True)
class FFNDevice:
    """Serves rows in order of arrival; one of a pipeline's."""

    pipeline: Pipeline
    number: int

    @property
    def busy_ns(self) -> int:
        return self.pipeline.read_ffn(self.number, events.FFN_BUSY_NS)

    @property
    def steps(self) -> int:
        return self.pipeline.read_ffn(self.number, events.FFN_STEPS)


@dataclass(frozen=True)
class AttentionDevice:
    """Holds lanes, each a place for one in-flight batch; one of a pipeline's."""

    pipeline: Pipeline
    number: int

    def submit(self) -> None:
        """A sequence was added to it now."""
        self.pipeline.submit(self)

    def end_earlier(self, end_ns: int) -> None:
        """Its step, under way as one stage in its only lane, ends at `end_ns` instead of later."""
        self.pipeline.end_earlier(self, end_ns)

    @property
    def busy_ns(self) -> int:
        return self.pipeline.read_device(self.number, events.BUSY_NS)

    @property
    def crossed_bytes(self) -> int:
        return self.pipeline.read_device(self.number, events.CROSSED)
