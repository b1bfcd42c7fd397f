"""Time and memory of the package: generating, streaming, writing and reading traces. Each step runs in a process of its own,
so that its peak memory is its own."""

from __future__ import annotations

import multiprocessing
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from workloads.columnar import ModelLimits, Trace
from workloads.config import Source, workload_from_dict
from workloads.errors import WorkloadError
from workloads.files import read_trace, write_trace
from workloads.generate import build_trace
from workloads.sources import load_source

_MB = 1e6
Spent = tuple[float, float]  # seconds by the wall, of the processor


def bench(models: int, requests: int, source_mb: int) -> dict[str, Any]:
    """Run and print every step. Returns seconds, MB/s and peak memory (MB) by step. Raises WorkloadError."""
    if min(models, requests, source_mb) < 1:
        raise WorkloadError(f"bench: {models} models, {requests} requests, {source_mb} MB; each must be 1 or more")
    found: dict[str, Any] = {"models": models, "requests": requests}
    with tempfile.TemporaryDirectory() as folder:
        jsonl, parquet, source = (Path(folder) / name for name in ("t.jsonl", "t.parquet", "s.jsonl"))
        steps: tuple[tuple[str, Callable[..., Spent], tuple, Path | None], ...] = (
            ("generate", _generate, (models, requests), None),
            ("stream, lengths only", _stream, (models, requests, "none"), None),
            ("stream, with prompts", _stream, (models, requests, "random"), None),
            ("write JSON lines", _write, (models, requests, jsonl), jsonl),
            ("write Parquet", _write, (models, requests, parquet), parquet),
            ("read trace, JSON lines", _read, (jsonl,), jsonl),
            ("read trace, Parquet", _read, (parquet,), parquet),
            ("make a Mooncake-like file", _make_source, (source, source_mb), source),
            ("read Mooncake JSON lines", _load_source, (source,), source),
        )
        print(f"{models:,} models, {requests:,} requests; peak memory includes the interpreter's and libraries' own")
        print(f"{'step':<28}{'s':>8}{'CPU s':>8}{'MB/s':>8}{'MB/CPU s':>10}{'peak MB':>9}")
        for name, step, arguments, file in steps:
            seconds, cpu_s, peak_mb = _apart(step, arguments)
            speed = file.stat().st_size / _MB / seconds if file else None
            found[name] = {"seconds": seconds, "cpu_s": cpu_s, "peak_mb": peak_mb, "mb_per_s": speed}
            shown = f"{'':>18}" if file is None else f"{speed:>8.0f}{speed * seconds / cpu_s:>10.0f}"
            print(f"{name:<28}{seconds:>8.2f}{cpu_s:>8.2f}{shown}{peak_mb:>9.0f}", flush=True)
    return found


def _apart(step: Callable[..., Spent], arguments: tuple) -> tuple[float, float, float]:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_report, args=(theirs, step, arguments))
    process.start()
    theirs.close()
    try:
        return ours.recv()
    except EOFError:
        raise WorkloadError(f"bench: {step.__name__} failed, see above") from None
    finally:
        process.join()


class _Clock:
    """Time since it was made, by the wall and by the processor (all threads): on a busy machine they part."""

    def __init__(self) -> None:
        self._start = time.perf_counter(), time.process_time()

    def spent(self) -> Spent:
        return time.perf_counter() - self._start[0], time.process_time() - self._start[1]


def _report(pipe: Any, step: Callable[..., Spent], arguments: tuple) -> None:
    spent = step(*arguments)
    unit = 1 if sys.platform == "darwin" else 1024
    pipe.send((*spent, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / _MB))


def _made(models: int, requests: int, prompts: str = "random") -> Trace:
    """Bursty, skewed, log-normal: no cheap special case."""
    limits = [ModelLimits(f"model-{number:04d}", 32_000, 4096) for number in range(models)]
    content = {
        "duration_s": 1000.0,
        "arrivals": {"kind": "gamma", "cv": 2.0, "rate_rps": requests / 1000},
        "popularity": {"kind": "power_law", "alpha": 0.9},
        "lengths": {"kind": "lognormal", "prompt_min": 1, "prompt_max": 1024, "output_max": 512},
        "prompts": {"kind": prompts},
    }
    return build_trace(workload_from_dict(content), limits)


def _generate(models: int, requests: int) -> Spent:
    clock = _Clock()
    _made(models, requests)
    return clock.spent()


def _stream(models: int, requests: int, prompts: str) -> Spent:
    trace = _made(models, requests, prompts)
    clock = _Clock()
    for _ in trace:
        pass
    return clock.spent()


def _write(models: int, requests: int, path: Path) -> Spent:
    trace = _made(models, requests)
    clock = _Clock()
    write_trace(trace, path)
    return clock.spent()


def _read(path: Path) -> Spent:
    clock = _Clock()
    read_trace(path)
    return clock.spent()


def _make_source(path: Path, size_mb: int) -> Spent:
    """`size_mb` of JSON lines as Mooncake's: a dozen prefix hashes a row."""
    clock = _Clock()
    with path.open("w", encoding="utf-8") as file:
        row = 0
        while file.tell() < size_mb * _MB:
            hashes = list(range(12 * row, 12 * row + 12))
            file.write(
                f'{{"timestamp": {row * 3}, "input_length": 6100, "output_length": 350, "hash_ids": {hashes}}}\n'
            )
            row += 1
    return clock.spent()


def _load_source(path: Path) -> Spent:
    clock = _Clock()
    load_source(Source("mooncake", str(path)))
    return clock.spent()
