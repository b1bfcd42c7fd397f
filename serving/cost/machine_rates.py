"""What this machine reaches: bytes a second that its cores read, FLOP/s of a product, seconds of a crossing between two of them."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import torch

from kernels.linear import linear, pack
from serving import bench_crossing
from serving.errors import UserError
from serving.spec import element_bytes

STREAM_BYTES = 256 * 2**20
STREAM_SECONDS = 1.0


def stream_rate(seconds: float = STREAM_SECONDS, started: Callable[[], None] = lambda: None) -> float:
    """Bytes a second that one core reads: a sum over more than any cache holds. Calls `started` when it begins to."""
    block = torch.ones(STREAM_BYTES // element_bytes("float32"))
    started()
    rates, end = [], time.perf_counter() + seconds
    while time.perf_counter() < end:
        started = time.thread_time()
        block.sum()
        rates.append(STREAM_BYTES / (time.thread_time() - started))
    return statistics.median(rates)


def stream_rates() -> dict[str, float]:
    """Bytes a second that one core reads alone, and that two cores read together, a pinned process each.

    Raises :class:`UserError` when one of them fails.
    """
    cores = sorted(os.sched_getaffinity(0))[:2]
    return {"memory_bandwidth": _streamed(cores[:1]), "shared_memory_bandwidth": _streamed(cores)}


def _streamed(cores: list[int]) -> float:
    command = [sys.executable, "-m", "serving.cost", "stream"]
    running = [subprocess.Popen([*command, "--core", str(c)], stdout=subprocess.PIPE, text=True) for c in cores]
    outputs = [process.communicate()[0] for process in running]
    if any(process.returncode for process in running):
        raise UserError("a stream process failed; are the cores in this process's affinity mask?")
    return sum(float(output.split()[-1]) for output in outputs)


def product_rate(dtype: torch.dtype, size: int = 512, seconds: float = 0.5) -> float:
    """FLOP/s of a packed product of `size` rows, the engine's own linear layer."""
    weight, x = pack(torch.randn(2 * size, 2 * size).to(dtype)), torch.randn(size, 2 * size).to(dtype)
    flops, rates, end = 2.0 * size * (2 * size) ** 2, [], time.perf_counter() + seconds
    while time.perf_counter() < end:
        started = time.thread_time()
        linear(x, weight)
        rates.append(flops / (time.thread_time() - started))
    return statistics.median(rates)


def product_rates() -> dict[str, float]:
    """FLOP/s of one core, in both element types."""
    return {"fp32_flops": product_rate(torch.float32), "bf16_flops": product_rate(torch.bfloat16)}


def crossing_rates(hidden: int = 1024, rounds: int = 2000) -> dict[str, float]:
    """Seconds of one way through the engine's mailbox with one row, between two pinned cores; nothing on one core."""
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        return {}
    round_trips_us = bench_crossing.measure(1, hidden, rounds, (cores[0], cores[1]))
    return {"crossing_lowered_s": float(statistics.median(round_trips_us)) / 2e6}


def machine_name() -> str:
    """The CPU's model name as the kernel reports it."""
    with open("/proc/cpuinfo") as lines:
        names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else 'unknown CPU'}, {len(os.sched_getaffinity(0))} cores"
