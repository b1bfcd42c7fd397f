"""The event loop of lanes on cards, over flat numbers: the same function compiled by Numba, or as it stands where that is missing.

A lane goes through the stages of its step one after the other, each on a device or several at once, or on the way between two. While
stages of several lanes are on a card, each goes on more slowly, by the rule of serving/cost/contention.py for kernels that take turns; a
stage on several cards goes on as on the one where it fares worst. At every event all lanes are brought up to date. Events fall on
whole nanoseconds and nothing changes between them, so it does not matter in how many calls they are worked through.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np

NEVER = 1 << 62
NOBODY = -1
ON_THE_WAY = -1  # the place of a stage that is on no device
_LEAST_NS = 1e-6  # what rounding leaves of a stage that is over

# Of a lane, whole numbers: how many stages its step has, at which it is (NOBODY: no step), and which kind of step that is.
STAGES, AT, KIND, LANE_FIELDS = range(4)
# Of a stage: nanoseconds alone, those of one of its kernels, and the shares of a card's bandwidth and arithmetic that it takes.
ALONE_NS, KERNEL_NS, BYTES, FLOPS, STAGE_FIELDS = range(5)
# Of a lane, as far as it is: nanoseconds left of its stage if it were alone, and by how much it is slowed.
LEFT_NS, SLOWED, PROGRESS_FIELDS = range(3)
# Of a device: its card, lanes on it now, since when one was, nanoseconds with one at least until then, stages that began there.
CARD, HERE, BUSY_SINCE_NS, BUSY_NS, BEGUN, DEVICE_FIELDS = range(6)
# Of a place: where its devices stand in the list of them, and how many they are.
FIRST, COUNT, PLACE_FIELDS = range(3)
# Of all: when the lanes were brought up to date, and when something happens next.
SINCE_NS, NEXT_NS, CLOCK_FIELDS = range(3)


def bring_up_to(now_ns, lanes, progress, clock):
    """Take off what the lanes have done until `now_ns`."""
    passed_ns = now_ns - clock[SINCE_NS]
    for lane in range(len(lanes)):
        if lanes[lane, AT] != NOBODY:
            progress[lane, LEFT_NS] -= passed_ns / progress[lane, SLOWED]
    clock[SINCE_NS] = now_ns


def leave(place, places, listed, devices, clock):
    """A stage that was at `place` is over."""
    if place != ON_THE_WAY:
        for at in range(places[place, FIRST], places[place, FIRST] + places[place, COUNT]):
            device = listed[at]
            devices[device, HERE] -= 1
            if not devices[device, HERE]:
                devices[device, BUSY_NS] += clock[SINCE_NS] - devices[device, BUSY_SINCE_NS]


def enter(lane, at, lanes, stage_places, stages, progress, places, listed, devices, clock):
    """The lane comes to the stage of that number."""
    lanes[lane, AT], progress[lane, LEFT_NS], progress[lane, SLOWED] = at, stages[lane, at, ALONE_NS], 1.0
    place = stage_places[lane, at]
    if place != ON_THE_WAY:
        for entry in range(places[place, FIRST], places[place, FIRST] + places[place, COUNT]):
            device = listed[entry]
            if not devices[device, HERE]:
                devices[device, BUSY_SINCE_NS] = clock[SINCE_NS]
            devices[device, HERE] += 1
            devices[device, BEGUN] += 1


def is_on(card, place, places, listed, devices):
    """Whether a stage at `place` is on `card`."""
    if place != ON_THE_WAY:
        for entry in range(places[place, FIRST], places[place, FIRST] + places[place, COUNT]):
            if devices[listed[entry], CARD] == card:
                return True
    return False


def slowed_on(card, lane, lanes, stage_places, stages, places, listed, devices, waits):
    """By how much the lane's stage is slowed on `card`."""
    at, crowd = lanes[lane, AT], 1.0
    bandwidth, compute = stages[lane, at, BYTES], stages[lane, at, FLOPS]
    all_bandwidth, all_compute = bandwidth, compute
    for other in range(len(lanes)):
        there = lanes[other, AT]
        if other != lane and there != NOBODY and is_on(card, stage_places[other, there], places, listed, devices):
            part = waits[lanes[lane, KIND], lanes[other, KIND]]
            crowd += part * stages[other, there, KERNEL_NS] / stages[lane, at, KERNEL_NS]
            all_bandwidth += stages[other, there, BYTES]
            all_compute += stages[other, there, FLOPS]
    stretched = max(1.0 + bandwidth * max(all_bandwidth - 1.0, 0.0), 1.0 + compute * max(all_compute - 1.0, 0.0))
    return max(crowd, stretched)


def slow_down(lanes, stage_places, stages, progress, places, listed, devices, waits, clock):
    """By how much each lane is slowed from now on, and when the first of them ends its stage."""
    clock[NEXT_NS] = NEVER
    for lane in range(len(lanes)):
        at = lanes[lane, AT]
        if at == NOBODY:
            continue
        place, slowed = stage_places[lane, at], 1.0
        if place != ON_THE_WAY:
            for entry in range(places[place, FIRST], places[place, FIRST] + places[place, COUNT]):
                card = devices[listed[entry], CARD]
                here = slowed_on(card, lane, lanes, stage_places, stages, places, listed, devices, waits)
                slowed = max(slowed, here)
        progress[lane, SLOWED] = slowed
        left_ns = progress[lane, LEFT_NS] * slowed - _LEAST_NS
        clock[NEXT_NS] = min(clock[NEXT_NS], clock[SINCE_NS] + max(int(np.ceil(left_ns)), 0))


def begin(lane, now_ns, lanes, stage_places, stages, progress, places, listed, devices, waits, clock):
    """The step whose stages stand in `lane` begins at `now_ns`."""
    bring_up_to(now_ns, lanes, progress, clock)
    enter(lane, 0, lanes, stage_places, stages, progress, places, listed, devices, clock)
    slow_down(lanes, stage_places, stages, progress, places, listed, devices, waits, clock)


def advance(until_ns, lanes, stage_places, stages, progress, places, listed, devices, waits, clock):
    """Take all events up to `until_ns`. Returns the lane whose step has ended, which is empty then, at the time in `clock`; NOBODY
    where nothing more is due."""
    while clock[NEXT_NS] <= until_ns:
        bring_up_to(clock[NEXT_NS], lanes, progress, clock)
        ended = NOBODY
        for lane in range(len(lanes)):
            at = lanes[lane, AT]
            if at == NOBODY or progress[lane, LEFT_NS] > _LEAST_NS * progress[lane, SLOWED]:
                continue
            last = at + 1 == lanes[lane, STAGES]
            if last and ended != NOBODY:
                continue  # in the same nanosecond as another: at the next look
            leave(stage_places[lane, at], places, listed, devices, clock)
            if last:
                lanes[lane, AT], ended = NOBODY, lane
            else:
                enter(lane, at + 1, lanes, stage_places, stages, progress, places, listed, devices, clock)
        slow_down(lanes, stage_places, stages, progress, places, listed, devices, waits, clock)
        if ended != NOBODY:
            return ended
    return NOBODY


@functools.cache
def compiled() -> tuple[Callable, Callable] | None:
    """`begin` and `advance` as machine code, kept on disk where a place for that can be written to; None without Numba."""
    try:
        import numba
        from numba.extending import register_jitable
    except ImportError:
        return None
    for called in (bring_up_to, leave, enter, is_on, slowed_on, slow_down):
        register_jitable(called)
    try:
        return numba.njit(begin, cache=True), numba.njit(advance, cache=True)
    except RuntimeError:  # no such place
        return numba.njit(begin), numba.njit(advance)
