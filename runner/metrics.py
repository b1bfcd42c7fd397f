"""Metrics from rows, under the names that `vllm bench serve` gives them. Pure functions; nothing here knows a system.

TTFT runs from the *planned* arrival. TPOT is (e2el - ttft) / (n - 1), undefined for n = 1. ITL is the gap between tokens
of a request, which the paper calls TBT; it is pooled over tokens and also given per model, since pooling hides cold models.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from runner.config import SLO
from runner.observation import COMPLETED, FAILED, REJECTED, Observation, PoolRow, RequestRow

LATENCIES = ("ttft_ms", "tpot_ms", "itl_ms", "e2el_ms", "queue_wait_ms")
STATISTICS = ("mean", "median", "std", "p90", "p95", "p99")


@dataclass(frozen=True)
class RequestLatency:
    """Latencies of one request in milliseconds; None where undefined."""

    ttft_ms: float | None
    tpot_ms: float | None
    e2el_ms: float | None
    queue_wait_ms: float | None
    itl_ms: tuple[float, ...]


def latency_of(row: RequestRow) -> RequestLatency:
    """Latencies of a request, from whatever of it was seen."""
    times = row.token_times_ns
    queue_wait_ms = None if row.admitted_ns is None else (row.admitted_ns - row.planned_ns) / 1e6
    if not times:
        return RequestLatency(None, None, None, queue_wait_ms, ())
    ttft_ms, e2el_ms = (times[0] - row.planned_ns) / 1e6, (times[-1] - row.planned_ns) / 1e6
    tpot_ms = (e2el_ms - ttft_ms) / (len(times) - 1) if len(times) > 1 else None
    gaps = tuple((after - before) / 1e6 for before, after in itertools.pairwise(times))
    return RequestLatency(ttft_ms, tpot_ms, e2el_ms, queue_wait_ms, gaps)


def statistics(values: Iterable[float]) -> dict[str, float | None]:
    """Mean, median, standard deviation and percentiles; all None for no values."""
    array = np.fromiter(values, dtype=np.float64)
    if not array.size:
        return dict.fromkeys(STATISTICS)
    percentiles = np.percentile(array, [50, 90, 95, 99])
    numbers = (array.mean(), percentiles[0], array.std(), *percentiles[1:])
    return {name: float(number) for name, number in zip(STATISTICS, numbers, strict=True)}


def latency_metrics(rows: Sequence[RequestRow]) -> dict[str, float | None]:
    """`mean_ttft_ms` ... `p99_queue_wait_ms` over completed requests; ITL is pooled over their tokens."""
    latencies = [latency_of(row) for row in rows if row.outcome == COMPLETED]
    metrics: dict[str, float | None] = {}
    for name in LATENCIES:
        if name == "itl_ms":
            values = [gap for latency in latencies for gap in latency.itl_ms]
        else:
            values = [value for latency in latencies if (value := getattr(latency, name)) is not None]
        metrics |= {f"{statistic}_{name}": value for statistic, value in statistics(values).items()}
    return metrics


def meets(row: RequestRow, slo: SLO) -> bool:
    """Whether a request completed within its SLO; one without a TPOT is judged by its TTFT."""
    if row.outcome != COMPLETED:
        return False
    latency = latency_of(row)
    return latency.ttft_ms <= slo.ttft_ms and (latency.tpot_ms is None or latency.tpot_ms <= slo.tpot_ms)


def count_metrics(rows: Sequence[RequestRow], slo: SLO, duration_s: float, offered_s: float) -> dict[str, float | None]:
    """Outcomes, throughputs over the whole run, goodput and attainment (failed, unfinished and rejected requests miss)."""
    completed = [row for row in rows if row.outcome == COMPLETED]
    good = sum(meets(row, slo) for row in rows)
    tokens = sum(len(row.token_times_ns) for row in rows)

    def per(count: float, seconds: float) -> float | None:
        return count / seconds if seconds > 0 else None

    return {
        "num_requests": len(rows),
        "completed": len(completed),
        "rejected": sum(row.outcome == REJECTED for row in rows),
        "failed": sum(row.outcome == FAILED for row in rows),
        "preemptions": sum(row.preemptions for row in rows),
        "total_input_tokens": sum(row.prompt_tokens for row in completed),
        "total_output_tokens": tokens,
        "duration_s": duration_s,
        "offered_rate_rps": per(len(rows), offered_s),
        "request_throughput": per(len(completed), duration_s),
        "output_throughput": per(tokens, duration_s),
        "request_goodput": per(good, duration_s),
        "slo_attainment": good / len(rows) if rows else None,
    }


def pool_metrics(pools: Sequence[PoolRow]) -> dict[str, float | None]:
    """Peak and time-weighted mean of pages in use over all pools, and the peak share of the budget."""
    if not pools:
        return {"peak_kv_pages": None, "mean_kv_pages": None, "kv_page_budget": None, "peak_kv_share": None}
    total: dict[int, int] = {}
    latest: dict[tuple[str, str], int] = {}
    budgets: dict[str, int] = {}
    in_use = 0
    for row in sorted(pools, key=lambda r: r.time_ns):
        in_use += row.pages_in_use - latest.get((row.pool, row.model), 0)
        latest[row.pool, row.model] = row.pages_in_use
        budgets[row.pool] = row.page_budget
        total[row.time_ns] = in_use
    times, pages = np.array(list(total)), np.array(list(total.values()), dtype=np.float64)
    widths = np.diff(times)
    mean = float((pages[:-1] * widths).sum() / widths.sum()) if widths.size and widths.sum() else float(pages.mean())
    budget = sum(budgets.values())
    peak = int(pages.max())
    return {
        "peak_kv_pages": peak,
        "mean_kv_pages": mean,
        "kv_page_budget": budget,
        "kv_page_bytes": pools[0].page_bytes,
        "peak_kv_share": peak / budget if budget else None,
    }


def device_metrics(observation: Observation) -> dict[str, float | None]:
    """Busy share of each device, and what crossed, was swapped and preempted over all of them."""
    metrics: dict[str, float | None] = {
        f"busy_share/{device.device}": device.busy_ns / device.elapsed_ns if device.elapsed_ns else None
        for device in observation.devices
    }
    metrics["bytes_crossed"] = sum(device.bytes_crossed for device in observation.devices)
    swaps = sum(device.swaps for device in observation.devices)
    metrics["swaps"] = swaps
    parts = dict.fromkeys(part for device in observation.devices for part in device.switch_ns)
    for part in parts:
        total_ns = sum(device.switch_ns.get(part, 0) for device in observation.devices)
        metrics[f"switch_ms/{part}"] = total_ns / 1e6 / swaps if swaps else None
    return metrics


def load_metrics(observation: Observation) -> dict[str, float | None]:
    """Whether the run was what it claims: how late the host handed requests over, and what others took of the cores."""
    lags_ms = [
        (row.submitted_ns - row.planned_ns) / 1e6 for row in observation.requests if row.submitted_ns is not None
    ]
    return {"p99_submit_lag_ms": statistics(lags_ms)["p99"], "other_cpu_share": observation.other_cpu_share}


def summarise(observation: Observation, slo: SLO, offered_s: float) -> dict[str, float | None]:
    """All metrics of a run. `offered_s` is the length of the trace, which the offered rate is counted over."""
    rows = observation.requests
    return {
        **count_metrics(rows, slo, observation.duration_ns / 1e9, offered_s),
        **latency_metrics(rows),
        **pool_metrics(observation.pools),
        **device_metrics(observation),
        **load_metrics(observation),
    }


def by_model(observation: Observation, slo: SLO, offered_s: float) -> dict[str, Mapping[str, float | None]]:
    """Counts and latencies of each model alone."""
    models = sorted({row.model for row in observation.requests})
    duration_s = observation.duration_ns / 1e9
    metrics = {}
    for model in models:
        rows = [row for row in observation.requests if row.model == model]
        metrics[model] = {**count_metrics(rows, slo, duration_s, offered_s), **latency_metrics(rows)}
    return metrics
