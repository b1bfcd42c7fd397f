"""Timing of device work, and the ceilings that its results are divided by, measured in the same run."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from kernels.tuning import card_name

# Datasheets: bytes/s and dense bfloat16 FLOP/s. Targets of decode kernels are fractions of the first.
DATASHEETS = {
    "nvidia_h200": (4.8e12, 989e12),
    "nvidia_h100_80gb_hbm3": (3.35e12, 989e12),
    "nvidia_a100_sxm4_80gb": (2.039e12, 312e12),
    "nvidia_a100_sxm4_40gb": (1.555e12, 312e12),
}
REPEATS = 7
GRAPH_SECONDS = 4e-3  # device work behind one sample
HOST_SECONDS = 0.05


@dataclass(frozen=True)
class Ceilings:
    """What this machine can do: measured, and by its datasheet where one is known (0 otherwise)."""

    bytes_per_s: float
    flops: float
    datasheet_bytes_per_s: float
    datasheet_flops: float


def seconds_per_call(variants: Sequence[Callable[[], object]], device: torch.device) -> float:
    """Median seconds of one call. `variants` do the same work on different data, called in turn so that caches do not
    stand in for memory; on CUDA they are captured in one graph, so that the host's time is no part of it."""
    return alternated([variants], device)[0]


def alternated(contestants: Sequence[Sequence[Callable[[], object]]], device: torch.device) -> list[float]:
    """:func:`seconds_per_call` of each contestant, in one run. On the CPU they take turns, sample by sample: its speed
    drifts by more than what they differ by."""
    if device.type == "cuda":
        return [_graph_seconds(variants, device) for variants in contestants]
    rounds = [max(1, int(HOST_SECONDS / max(_pass_seconds(variants, 2), 1e-9))) for variants in contestants]
    samples: list[list[float]] = [[] for _ in contestants]
    for _ in range(REPEATS):
        for variants, count, mine in zip(contestants, rounds, samples, strict=True):
            mine.append(_pass_seconds(variants, count) / len(variants))
    return [statistics.median(mine) for mine in samples]


def _pass_seconds(variants: Sequence[Callable[[], object]], rounds: int) -> float:
    """Mean seconds of one pass over `variants`, of `rounds`."""
    start = time.perf_counter()
    for _ in range(rounds):
        for call in variants:
            call()
    return (time.perf_counter() - start) / rounds


def _graph_seconds(variants: Sequence[Callable[[], object]], device: torch.device) -> float:
    for call in variants:  # compiles, loads and allocates
        call()
    torch.cuda.synchronize(device)
    estimate = _replay_seconds(capture(variants), device) / len(variants)
    rounds = max(1, min(200, int(GRAPH_SECONDS / max(estimate * len(variants), 1e-7))))
    graph = capture(list(variants) * rounds)
    _replay_seconds(graph, device)
    samples = [_replay_seconds(graph, device) for _ in range(REPEATS)]
    return statistics.median(samples) / (len(variants) * rounds)


def capture(calls: Sequence[Callable[[], object]], device: torch.device | None = None) -> torch.cuda.CUDAGraph:
    """All calls, one after another, in one graph of `device` (the current one by default)."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.device(device), torch.cuda.graph(graph, stream=torch.cuda.Stream(device)):
        for call in calls:
            call()
    return graph


def _replay_seconds(graph: torch.cuda.CUDAGraph, device: torch.device) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    graph.replay()
    torch.cuda.synchronize(device)
    start.record()
    graph.replay()
    end.record()
    torch.cuda.synchronize(device)
    return start.elapsed_time(end) / 1e3


def measure_ceilings(device: torch.device, dtype: torch.dtype) -> Ceilings:
    """Bandwidth by the better of a large copy (bytes read plus written) and a large sum; compute by a large product."""
    cuda = device.type == "cuda"
    elements = (1 << 30) if cuda else (1 << 29)  # bytes: many times what any cache holds
    source = torch.randint(-100, 100, (elements,), dtype=torch.int8, device=device).view(torch.float32)
    target = torch.empty_like(source)
    copied = 2 * elements / seconds_per_call([lambda: target.copy_(source)], device)
    # As integers: no conversion, and NaN patterns do not matter.
    words = source.view(torch.int32)
    read = elements / seconds_per_call([lambda: words.amax()], device)
    size = 8192 if cuda else 1024
    left, right = torch.randn(2, size, size, device=device).to(dtype)
    flops = 2 * size**3 / seconds_per_call([lambda: left @ right], device)
    sheet = DATASHEETS.get(card_name(device), (0.0, 0.0))
    return Ceilings(max(copied, read), flops, *sheet)
