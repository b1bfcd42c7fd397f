"""Where a run lies on each axis that sweeps vary, read from its resolved configuration."""

from __future__ import annotations

from typing import Any

from paper_figures.records import Run

RATE_KEYS = ("workload.arrivals.rate_rps", "workload.duration_s")
SKEW_KEYS = ("workload.popularity.alpha",)
MODEL_COUNT_KEYS = ("models",)
CONTEXT_KEYS = ("workload.lengths.prompt_",)


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
    return float(rate_rps) * (model_count(run) if _workload(run, "arrivals", "rate_of") == "model" else 1)


def skew(run: Run) -> float | None:
    """alpha of popularity proportional to rank^-alpha."""
    alpha = _workload(run, "popularity", "alpha")
    return None if alpha is None else float(alpha)


def context(run: Run) -> float | None:
    """Mean prompt tokens that the workload asks for."""
    low, high = _workload(run, "lengths", "prompt_min"), _workload(run, "lengths", "prompt_max")
    if high is None:
        return None
    fixed = _workload(run, "lengths", "kind") == "fixed" or low is None
    return float(high) if fixed else (float(low) + float(high)) / 2
