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
_SOURCE_MB = 100


def bench(models: int, requests: int) -> dict[str, Any]:
    """Run and print every step. Returns seconds, MB/s and peak memory (MB) by step. Raises WorkloadError."""
    if models < 1 or requests < 1:
        raise WorkloadError(f"bench: {models} models and {requests} requests; both must be 1 or more")
    found: dict[str, Any] = {"models": models, "requests": requests}
    with tempfile.TemporaryDirectory() as folder:
        jsonl, parquet, source = (Path(folder) / name for name in ("t.jsonl", "t.parquet", "s.jsonl"))
        steps: tuple[tuple[str, Callable[..., float], tuple, Path | None], ...] = (
            ("generate", _generate, (models, requests), None),
            ("stream, lengths only", _stream, (models, requests, "none"), None),
            ("stream, with prompts", _stream, (models, requests, "random"), None),
            ("write JSON lines", _write, (models, requests, jsonl), jsonl),
            ("write Parquet", _write, (models, requests, parquet), parquet),
            ("read trace, JSON lines", _read, (jsonl,), jsonl),
            ("read trace, Parquet", _read, (parquet,), parquet),
            ("make a Mooncake-like file", _make_source, (source,), source),
            ("read Mooncake JSON lines", _load_source, (source,), source),
        )
        print(f"{models:,} models, {requests:,} requests; peak memory includes the interpreter's and libraries' own")
        print(f"{'step':<28}{'s':>8}{'MB/s':>8}{'peak MB':>9}")
        for name, step, arguments, file in steps:
            seconds, peak_mb = _apart(step, arguments)
            speed = file.stat().st_size / _MB / seconds if file else None
            found[name] = {"seconds": seconds, "peak_mb": peak_mb, "mb_per_s": speed}
            print(f"{name:<28}{seconds:>8.2f}{'' if speed is None else f'{speed:.0f}':>8}{peak_mb:>9.0f}", flush=True)
    return found


def _apart(step: Callable[..., float], arguments: tuple) -> tuple[float, float]:
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


def _report(pipe: Any, step: Callable[..., float], arguments: tuple) -> None:
    seconds = step(*arguments)
    unit = 1 if sys.platform == "darwin" else 1024
    pipe.send((seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / _MB))


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


def _generate(models: int, requests: int) -> float:
    start = time.perf_counter()
    _made(models, requests)
    return time.perf_counter() - start


def _stream(models: int, requests: int, prompts: str) -> float:
    trace = _made(models, requests, prompts)
    start = time.perf_counter()
    for _ in trace:
        pass
    return time.perf_counter() - start


def _write(models: int, requests: int, path: Path) -> float:
    trace = _made(models, requests)
    start = time.perf_counter()
    write_trace(trace, path)
    return time.perf_counter() - start


def _read(path: Path) -> float:
    start = time.perf_counter()
    read_trace(path)
    return time.perf_counter() - start


def _make_source(path: Path) -> float:
    """`_SOURCE_MB` of JSON lines as Mooncake's: a dozen prefix hashes a row."""
    start = time.perf_counter()
    with path.open("w", encoding="utf-8") as file:
        row = 0
        while file.tell() < _SOURCE_MB * _MB:
            hashes = list(range(12 * row, 12 * row + 12))
            file.write(
                f'{{"timestamp": {row * 3}, "input_length": 6100, "output_length": 350, "hash_ids": {hashes}}}\n'
            )
            row += 1
    return time.perf_counter() - start


def _load_source(path: Path) -> float:
    start = time.perf_counter()
    load_source(Source("mooncake", str(path)))
    return time.perf_counter() - start
