"""Where a run lies on each axis that sweeps vary, read from its resolved configuration."""

from __future__ import annotations

import re
from typing import Any

from paper_figures.records import Run

RATE_KEYS = ("workload.arrivals.rate_rps", "workload.duration_s")
SKEW_KEYS = ("workload.popularity.alpha",)
MODEL_COUNT_KEYS = ("models",)
CONTEXT_KEYS = ("workload.lengths.prompt_", "workload.lengths.bins")


def _workload(run: Run, *keys: str) -> Any:
    value: Any = run.config.get("workload") or {}
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    return value


def model_count(run: Run) -> int:
    return len(run.config.get("models") or ())


def rate(run: Run) -> float | None:
    """Requests a second over all models."""
    rate_rps = _workload(run, "arrivals", "rate_rps")
    if rate_rps is None:
        return None
    per = model_count(run) if _workload(run, "arrivals", "rate_of") == "model" else 1
    return round(float(rate_rps) * per, 9)  # three times 0.2 is 0.6


def skew(run: Run) -> float | None:
    """alpha of popularity proportional to rank^-alpha, where popularity is that."""
    if _workload(run, "popularity", "kind") not in (None, "power_law"):
        return None
    alpha = _workload(run, "popularity", "alpha")
    return None if alpha is None else float(alpha)


def places(run: Run) -> int | None:
    """Sequences of one model that can be in steps at once: those of a batch, times the batches that a model may have in flight.
    None where a model has replicas, whose number is the placement's."""
    options = run.options
    most, lanes = options.get("max_batch"), options.get("lanes", 1)
    return None if most is None or options.get("groups") else most * (options.get("lanes_of_model") or lanes)


def context(run: Run) -> float | None:
    """Most tokens, prompt and output together, that a request of the workload may come to hold."""
    kind, scale = _workload(run, "lengths", "kind"), float(_workload(run, "lengths", "scale") or 1.0)
    bins = _workload(run, "lengths", "bins") or ()
    if len(bins) == 1 and kind in ("bins", "empirical"):
        upper = re.fullmatch(r"\d+-(\d+)K", str(bins[0]))
        return float(upper[1]) * 1024 * scale if upper else None
    prompt = _workload(run, "lengths", "prompt_max")
    if prompt is None or kind not in ("fixed", "uniform"):
        return None
    return (float(prompt) + float(_workload(run, "lengths", "output_max") or 0)) * scale
