"""The event loop of the pipeline, over flat numbers: the same function compiled by Numba, or as it stands where that is missing.

A step of 48 layers is 150 events, nearly all of them repetitions with nothing to decide. So the loop touches no object: lanes,
attention devices and FFN devices are records in flat sequences of whole numbers (arrays when compiled, lists when not), and it
returns only where a policy has to speak: a step has ended, or a device may begin one.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

NEVER = 1 << 62
NONE, ATTENDED, ARRIVED, RETURNED, FINISHED = range(5)  # what happens to a lane next
EMPTY, BEGUN, UNDER_WAY = range(3)  # of a lane: no step, one whose first stage has not started, one that has
IDLE, MAY_BEGIN, HAS_ENDED = range(3)  # why the loop returned

# Record of a lane. ROUTE is where in the table the kind of each layer stands, JOBS where for each kind the position of its
# entry does: a count, then so many pairs of FFN device and nanoseconds. ROUTE below 0: the whole step is one stage of FIRST_NS.
(DUE, NUMBER, EVENT, LAYER, WAITING, DEVICE, STATE, FIRST_NS, ATTENTION_NS, FINISH_NS, LAYERS, CROSS_NS, CROSSED_BYTES, ROUTE,
 JOBS, LANE_MINDS, FFN_MINDS, LANE_FIELDS) = range(18)  # fmt: skip
# Record of an attention device: its lanes lie side by side. MEMORY numbers what it draws on: a card's, or that of a host's cores.
FIRST_LANE, LANES, CURSOR, BUSY, ASKS, FREE_NS, BUSY_NS, CROSSED, MEMORY, DEVICE_FIELDS = range(10)
# Record of an FFN device.
FFN_FREE_NS, FFN_BUSY_NS, FFN_STEPS, FFN_MEMORY, FFN_FIELDS = range(5)
# What runs on a device (a pair of each) and what a lane's stages are (two pairs): slowdown beside a stream, share drawn.
PAIR = 2
PUSHED, NEXT_NS, COUNTERS = range(3)


def lost_ns(own, own_is_ffn, now_ns, stage_ns, beside, draws, devices, device_runs, ffns, ffn_runs):
    """What a stage that begins now loses to neighbours on the same memory that run already, and they to it: charged to the later
    of the two, because the end of the earlier one is settled. Stretching is by serving.cost.contention's rule."""
    lost = 0.0
    memory = ffns[own * FFN_FIELDS + FFN_MEMORY] if own_is_ffn else devices[own * DEVICE_FIELDS + MEMORY]
    for other in range(len(devices) // DEVICE_FIELDS):
        if devices[other * DEVICE_FIELDS + MEMORY] != memory:
            continue
        overlap_ns = min(devices[other * DEVICE_FIELDS + FREE_NS] - now_ns, stage_ns)
        if (own_is_ffn or other != own) and overlap_ns > 0:
            mine = 1.0 + (beside - 1.0) * device_runs[other * PAIR + 1]
            theirs = 1.0 + (device_runs[other * PAIR] - 1.0) * draws
            lost += overlap_ns * ((1.0 - 1.0 / mine) + (1.0 - 1.0 / theirs))
    for other in range(len(ffns) // FFN_FIELDS):
        if ffns[other * FFN_FIELDS + FFN_MEMORY] != memory:
            continue
        overlap_ns = min(ffns[other * FFN_FIELDS + FFN_FREE_NS] - now_ns, stage_ns)
        if not (own_is_ffn and other == own) and overlap_ns > 0:
            mine = 1.0 + (beside - 1.0) * ffn_runs[other * PAIR + 1]
            theirs = 1.0 + (ffn_runs[other * PAIR] - 1.0) * draws
            lost += overlap_ns * ((1.0 - 1.0 / mine) + (1.0 - 1.0 / theirs))
    return round(lost)


def soonest(lanes):
    """The lane to which something happens next, ties in the order in which it was settled; -1 when nothing will."""
    found = -1
    for lane in range(0, len(lanes), LANE_FIELDS):
        if lanes[lane + EVENT] != NONE and (
            found < 0
            or lanes[lane + DUE] < lanes[found + DUE]
            or (lanes[lane + DUE] == lanes[found + DUE] and lanes[lane + NUMBER] < lanes[found + NUMBER])
        ):
            found = lane
    return found


def advance(
    until_ns, wakes, now_ns, lanes, lane_runs, devices, device_runs, ffns, ffn_runs, table, counters
):  # fmt: skip
    """Wake the device numbered `wakes` (none below 0) at `now_ns`, then take all events up to `until_ns`.

    Returns (why, which, when): IDLE, nothing more is due; MAY_BEGIN, the lane numbered `which` is free and its device asks for
    a step (fill the lane in, or take ASKS back, and wake the device again); HAS_ENDED, the step of that lane.
    """
    while True:
        if wakes < 0:
            lane = soonest(lanes)
            counters[NEXT_NS] = NEVER if lane < 0 else lanes[lane + DUE]
            if lane < 0 or lanes[lane + DUE] > until_ns:
                return IDLE, -1, now_ns
            now_ns, event, wakes = lanes[lane + DUE], lanes[lane + EVENT], lanes[lane + DEVICE]
            device = wakes * DEVICE_FIELDS
            if event == ARRIVED:
                kind = table[lanes[lane + ROUTE] + lanes[lane + LAYER]]
                entry, end_ns = table[lanes[lane + JOBS] + kind], 0
                for job in range(entry + 1, entry + 1 + 2 * table[entry], 2):
                    number, job_ns = table[job], table[job + 1]
                    ffn = number * FFN_FIELDS
                    begins_ns = max(now_ns, ffns[ffn + FFN_FREE_NS])
                    if lanes[lane + FFN_MINDS]:
                        pair = lane // LANE_FIELDS * 2 * PAIR + PAIR
                        beside, draws = lane_runs[pair], lane_runs[pair + 1]
                        job_ns += lost_ns(
                            number, True, begins_ns, job_ns, beside, draws, devices, device_runs, ffns, ffn_runs
                        )
                        ffn_runs[number * PAIR], ffn_runs[number * PAIR + 1] = beside, draws
                    ffns[ffn + FFN_FREE_NS] = begins_ns + job_ns
                    ffns[ffn + FFN_BUSY_NS] += job_ns
                    ffns[ffn + FFN_STEPS] += 1
                    end_ns = max(end_ns, begins_ns + job_ns)
                counters[PUSHED] += 1
                lanes[lane + EVENT], lanes[lane + NUMBER] = RETURNED, counters[PUSHED]
                lanes[lane + DUE] = end_ns + lanes[lane + CROSS_NS]
                wakes = -1
                continue
            lanes[lane + EVENT] = NONE
            if event == RETURNED:
                lanes[lane + WAITING] = 1
                if devices[device + BUSY]:
                    wakes = -1
                    continue
            else:
                devices[device + BUSY] = 0
                if event == FINISHED:
                    lanes[lane + STATE] = EMPTY
                    return HAS_ENDED, lane // LANE_FIELDS, now_ns
                devices[device + CROSSED] += lanes[lane + CROSSED_BYTES]
                counters[PUSHED] += 1
                lanes[lane + EVENT], lanes[lane + NUMBER] = ARRIVED, counters[PUSHED]
                lanes[lane + DUE] = now_ns + lanes[lane + CROSS_NS]
        # The device is free: it starts the next stage of the first of its lanes, in turn, that has one.
        device = wakes * DEVICE_FIELDS
        for offset in range(devices[device + LANES]):
            index = (devices[device + CURSOR] + offset) % devices[device + LANES]
            lane = (devices[device + FIRST_LANE] + index) * LANE_FIELDS
            if lanes[lane + STATE] == EMPTY:
                if devices[device + ASKS]:
                    return MAY_BEGIN, lane // LANE_FIELDS, now_ns
                continue
            if lanes[lane + STATE] == BEGUN:
                lanes[lane + STATE], lanes[lane + LAYER] = UNDER_WAY, 0
                stage_ns, event = lanes[lane + FIRST_NS], ATTENDED if lanes[lane + ROUTE] >= 0 else FINISHED
            elif lanes[lane + WAITING]:
                lanes[lane + WAITING] = 0
                lanes[lane + LAYER] += 1
                if lanes[lane + LAYER] == lanes[lane + LAYERS]:
                    stage_ns, event = lanes[lane + FINISH_NS], FINISHED
                else:
                    stage_ns, event = lanes[lane + ATTENTION_NS], ATTENDED
            else:
                continue
            if lanes[lane + LANE_MINDS]:
                pair = lane // LANE_FIELDS * 2 * PAIR
                beside, draws = lane_runs[pair], lane_runs[pair + 1]
                stage_ns += lost_ns(wakes, False, now_ns, stage_ns, beside, draws, devices, device_runs, ffns, ffn_runs)
                device_runs[wakes * PAIR], device_runs[wakes * PAIR + 1] = beside, draws
            devices[device + BUSY] = 1
            devices[device + BUSY_NS] += stage_ns
            devices[device + FREE_NS] = now_ns + stage_ns
            devices[device + CURSOR] = index + 1
            counters[PUSHED] += 1
            lanes[lane + EVENT], lanes[lane + NUMBER], lanes[lane + DUE] = event, counters[PUSHED], now_ns + stage_ns
            break
        wakes = -1


@functools.cache
def compiled() -> Callable | None:
    """`advance` as machine code, kept on disk where a place for that can be written to; None without Numba."""
    try:
        import numba
        from numba.extending import register_jitable
    except ImportError:
        return None
    for called in (lost_ns, soonest):
        register_jitable(called)
    try:
        return numba.njit(advance, cache=True)
    except RuntimeError:  # no such place
        return numba.njit(advance)
