"""The event loop of lanes on cards, over flat numbers: the same function compiled by Numba, or as it stands where that is missing.

A lane goes through the stages of its step one after the other, each on a card or on the way between two. While stages of several
lanes are on a card, each goes on more slowly, by the rule of serving/cost/contention.py for kernels that take turns; at every event
all lanes are brought up to date. Events fall on whole nanoseconds and nothing changes between them, so it does not matter
in how many calls they are worked through.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np

NEVER = 1 << 62
NOBODY = -1
ON_THE_WAY = -1  # the device of a stage that is on none
_LEAST_NS = 1e-6  # what rounding leaves of a stage that is over

# Of a lane, whole numbers: how many stages its step has, at which it is (NOBODY: no step), and which kind of step that is.
STAGES, AT, KIND, LANE_FIELDS = range(4)
# Of a stage: nanoseconds alone, those of one of its kernels, and the shares of a card's bandwidth and arithmetic that it takes.
ALONE_NS, KERNEL_NS, BYTES, FLOPS, STAGE_FIELDS = range(5)
# Of a lane, as far as it is: nanoseconds left of its stage if it were alone, and by how much it is slowed.
LEFT_NS, SLOWED, PLACE_FIELDS = range(3)
# Of a device: nanoseconds with a stage on it at least, and how many stages began there.
BUSY_NS, BEGUN, DEVICE_FIELDS = range(3)
# Of all: when the lanes were brought up to date, and when something happens next.
SINCE_NS, NEXT_NS, CLOCK_FIELDS = range(3)


def bring_up_to(now_ns, lanes, stage_devices, places, devices, clock):
    """Take off what the lanes have done until `now_ns`."""
    passed_ns = now_ns - clock[SINCE_NS]
    for device in range(len(devices)):
        for lane in range(len(lanes)):
            at = lanes[lane, AT]
            if at != NOBODY and stage_devices[lane, at] == device:
                devices[device, BUSY_NS] += passed_ns
                break
    for lane in range(len(lanes)):
        if lanes[lane, AT] != NOBODY:
            places[lane, LEFT_NS] -= passed_ns / places[lane, SLOWED]
    clock[SINCE_NS] = now_ns


def slow_down(lanes, stage_devices, stages, places, cards, waits, clock):
    """By how much each lane is slowed from now on, and when the first of them ends its stage."""
    clock[NEXT_NS] = NEVER
    for lane in range(len(lanes)):
        at = lanes[lane, AT]
        if at == NOBODY:
            continue
        device, crowd = stage_devices[lane, at], 1.0
        bandwidth, compute = stages[lane, at, BYTES], stages[lane, at, FLOPS]
        all_bandwidth, all_compute = bandwidth, compute
        if device != ON_THE_WAY:
            for other in range(len(lanes)):
                there = lanes[other, AT]
                if other == lane or there == NOBODY or stage_devices[other, there] == ON_THE_WAY:
                    continue
                if cards[stage_devices[other, there]] != cards[device]:
                    continue
                part = waits[lanes[lane, KIND], lanes[other, KIND]]
                crowd += part * stages[other, there, KERNEL_NS] / stages[lane, at, KERNEL_NS]
                all_bandwidth += stages[other, there, BYTES]
                all_compute += stages[other, there, FLOPS]
        stretched = max(1.0 + bandwidth * max(all_bandwidth - 1.0, 0.0), 1.0 + compute * max(all_compute - 1.0, 0.0))
        places[lane, SLOWED] = max(crowd, stretched)
        left_ns = places[lane, LEFT_NS] * places[lane, SLOWED] - _LEAST_NS
        ends_ns = clock[SINCE_NS] + max(int(np.ceil(left_ns)), 0)
        clock[NEXT_NS] = min(clock[NEXT_NS], ends_ns)


def begin(lane, now_ns, lanes, stage_devices, stages, places, devices, cards, waits, clock):
    """The step whose stages stand in `lane` begins at `now_ns`."""
    bring_up_to(now_ns, lanes, stage_devices, places, devices, clock)
    enter(lane, 0, lanes, stage_devices, stages, places, devices)
    slow_down(lanes, stage_devices, stages, places, cards, waits, clock)


def enter(lane, at, lanes, stage_devices, stages, places, devices):
    """The lane comes to the stage of that number."""
    lanes[lane, AT], places[lane, LEFT_NS], places[lane, SLOWED] = at, stages[lane, at, ALONE_NS], 1.0
    if stage_devices[lane, at] != ON_THE_WAY:
        devices[stage_devices[lane, at], BEGUN] += 1


def advance(until_ns, lanes, stage_devices, stages, places, devices, cards, waits, clock):
    """Take all events up to `until_ns`. Returns the lane whose step has ended, which is empty then, at the time in `clock`; NOBODY
    where nothing more is due."""
    while clock[NEXT_NS] <= until_ns:
        bring_up_to(clock[NEXT_NS], lanes, stage_devices, places, devices, clock)
        ended = NOBODY
        for lane in range(len(lanes)):
            at = lanes[lane, AT]
            if at == NOBODY or places[lane, LEFT_NS] > _LEAST_NS * places[lane, SLOWED]:
                continue
            if at + 1 < lanes[lane, STAGES]:
                enter(lane, at + 1, lanes, stage_devices, stages, places, devices)
            elif ended == NOBODY:  # a second one ends in the same nanosecond, at the next look
                lanes[lane, AT], ended = NOBODY, lane
        slow_down(lanes, stage_devices, stages, places, cards, waits, clock)
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
    for called in (bring_up_to, slow_down, enter):
        register_jitable(called)
    try:
        return numba.njit(begin, cache=True), numba.njit(advance, cache=True)
    except RuntimeError:  # no such place
        return numba.njit(begin), numba.njit(advance)
