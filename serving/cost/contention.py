"""Contention of uncoordinated engines on one device, stated as a model because comparisons rest on it.

Engines that share a device without an arbiter launch whenever they have work. What that costs depends on how the device
shares itself between them:

- `share`: kernels of different engines run at once (streams of one process, MPS, threads on cores that share memory). Each
  keeps the part of its time that no common resource bounds (launch, latency chains); the part that memory bandwidth or
  arithmetic bounds is stretched by the total demand on that resource once it exceeds the device. On top, each further
  active engine costs every other `interference` (row-buffer and cache conflicts, blocks that wait for a free SM): a part of
  its time or, on cards where that was measured, of the other's, kernel by kernel (then what bandwidth or arithmetic would cost
  is in it, and counts only where it is more).
- `time_slice`: one engine at a time owns the device for a slice, in turn (separate processes without MPS; processes on
  one core). With n engines active each runs at 1/n, less the switches, and a kernel shorter than a slice waits, on
  average, for half of what the others hold.

Demands come from the cost model, never from outcomes: nothing here is tuned to a system's results.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass

from serving.cost.hardware import DECODE, Hardware
from serving.errors import UserError

MODES = ("share", "time_slice")


@dataclass(frozen=True)
class Load:
    """A kernel, stage or step that is active now: its time alone on the device, and what it moves and computes in it. `beside_stream`
    is its slowdown beside a core that streams memory, where devices are cores that share it. It is one of
    :data:`serving.cost.hardware.KINDS`, and made of so many `kernels`, one after the other."""

    alone_s: float
    bytes: float
    flops: float
    beside_stream: float = 1.0
    kind: str = DECODE
    kernels: int = 1

    @property
    def kernel_s(self) -> float:
        """What one of its kernels takes, in the mean."""
        return self.alone_s / self.kernels


@dataclass(frozen=True)
class Contention:
    """How a device shares itself. Defaults and their grounds:

    `mode` share: the paper's co-located engines overlap ("uncoordinated concurrency"); [assumption] as under MPS.
    `interference` None: the device's own (:class:`Hardware` says on what it rests), by kinds where that is known.
    `slice_s` 2 ms: [assumption], the order of NVIDIA's default time slice; Linux's is about 3 ms.
    `switch_s` 0.1 ms: [assumption], a GPU context switch; on a CPU a few microseconds. Of the two only switch over slice, 5 %,
    counts for a step's time. Loads measured on one H200 are met as well by 5 % as by none, and worse from 10 % on
    (`python -m serving.gpu_suite.simulate results/h200`, serving/gpu_suite/fitted_h200.json).
    """

    mode: str = "share"
    interference: float | None = None
    slice_s: float = 2e-3
    switch_s: float = 1e-4

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise UserError(f"unknown contention mode {self.mode!r}; known: {', '.join(MODES)}")
        if (self.interference or 0.0) < 0 or self.slice_s <= 0 or self.switch_s < 0:
            raise UserError("contention: interference and switch_s must not be negative, slice_s must be positive")


def slowdowns(
    loads: Sequence[Load], hardware: Hardware, contention: Contention, dtype: str = "bfloat16"
) -> list[float]:
    """By how much each active load is stretched while exactly these are active; at least 1, and exactly 1 alone."""
    if len(loads) < 2:
        return [1.0] * len(loads)
    if contention.mode == "time_slice":
        return [_time_slice(len(loads), contention)] * len(loads)
    bandwidth = [demand(load.bytes, load.alone_s, hardware.memory_bandwidth) for load in loads]
    compute = [demand(load.flops, load.alone_s, hardware.flops(dtype)) for load in loads]
    stretch = (max(1.0, sum(bandwidth)), max(1.0, sum(compute)))
    crowds = [1.0 + _interference(place, loads, hardware, contention) for place in range(len(loads))]
    bounds = [_stretched(b, f, stretch) for b, f in zip(bandwidth, compute, strict=True)]
    # Kernels that were measured waiting for each other waited for bandwidth too.
    both = max if hardware.interference_of and contention.interference is None else operator.mul
    return [both(crowd, bound) for crowd, bound in zip(crowds, bounds, strict=True)]


def _interference(place: int, loads: Sequence[Load], hardware: Hardware, contention: Contention) -> float:
    """What the others cost the load at `place`, as a part of its time alone: beyond bandwidth and arithmetic or, where it was measured,
    in all. There kernels of both come by turns, so each waits for a part of one of each other's, which many short ones beside long
    ones feel most."""
    if contention.interference is not None:
        return contention.interference * (len(loads) - 1)
    own, others = loads[place], [*loads[:place], *loads[place + 1 :]]
    measured = hardware.interference_of.get(own.kind)
    if not measured:
        return hardware.interference * len(others)
    return sum(measured[other.kind] * other.kernel_s for other in others) / own.kernel_s


def demand(amount: float, seconds: float, rate: float) -> float:
    """Share of a resource that a load takes when alone, 0..1."""
    return min(1.0, amount / (seconds * rate)) if seconds > 0 else 0.0


def _stretched(bandwidth: float, compute: float, stretch: tuple[float, float]) -> float:
    """Time alone = 1 = bounded part + the rest. The slower of the two resources decides."""
    return max(1.0 + bandwidth * (stretch[0] - 1.0), 1.0 + compute * (stretch[1] - 1.0))


def _time_slice(engines: int, contention: Contention) -> float:
    return engines * (1.0 + contention.switch_s / contention.slice_s)


def slice_wait_s(engines: int, contention: Contention) -> float:
    """Mean wait of a kernel that arrives while `engines - 1` others hold the device in turn, before it first runs."""
    if contention.mode != "time_slice" or engines < 2:
        return 0.0
    return 0.5 * (engines - 1) * (contention.slice_s + contention.switch_s)


def host_bandwidth_slowdowns(loads: Sequence[Load], hardware: Hardware) -> list[float]:
    """One load a device of a host whose devices share memory bandwidth (CPU cores): stretched when they ask for too much."""
    if not hardware.shared_memory_bandwidth or len(loads) < 2:
        return [1.0] * len(loads)
    rates = [load.bytes / load.alone_s if load.alone_s > 0 else 0.0 for load in loads]
    stretch = max(1.0, sum(rates) / hardware.shared_memory_bandwidth)
    shares = [demand(load.bytes, load.alone_s, hardware.memory_bandwidth) for load in loads]
    return [1.0 + share * (stretch - 1.0) for share in shares]


def neighbour_slowdown(beside_stream: float, neighbours: Sequence[Load], hardware: Hardware) -> float:
    """Slowdown of a stage beside `neighbours` on other cores, from what was measured beside one that streams memory.

    In proportion to the bandwidth that the neighbours draw; a streaming core draws all that one core can.
    """
    drawn = sum(demand(load.bytes, load.alone_s, hardware.memory_bandwidth) for load in neighbours)
    return 1.0 + (beside_stream - 1.0) * drawn
