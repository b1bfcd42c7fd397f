"""What a trace holds: rates, gaps, popularity, lengths and active models, as plain numbers."""

from __future__ import annotations

from typing import Any

import numpy as np

from workloads.columnar import Trace
from workloads.expected import PERCENTILES, active_models
from workloads.popularity import cold_models

COLD = 0.9  # the share of models that the paper's Fig. 1a calls cold


def describe(trace: Trace, window_s: float) -> dict[str, Any]:
    """Statistics of `trace`, with `active` counted in windows of `window_s`."""
    context = trace.prompt_tokens.astype(np.int64) + trace.output_tokens
    shares = model_counts(trace) / max(len(trace), 1)
    tokens = np.bincount(trace.model, weights=context, minlength=len(trace.models))
    active = active_over_time(trace, window_s)
    return {
        "requests": len(trace),
        "duration_s": trace.duration_s,
        "rate_rps": len(trace) / trace.duration_s,
        "gap_cv": gap_cv(trace.arrival_s),
        "model_gap_cv": model_gap_cv(trace),
        "shares": shares,
        "cold_token_share": cold_share(tokens),
        "prompt_tokens": length_statistics(trace.prompt_tokens),
        "output_tokens": length_statistics(trace.output_tokens),
        "context_tokens": length_statistics(context),
        "correlation": correlation(trace.prompt_tokens, trace.output_tokens),
        "active_models": {"mean": float(active.mean()), "max": int(active.max())},
        "active_if_poisson": active_models(len(trace) / trace.duration_s, shares, window_s),
        "requests_of_top_model": int(model_counts(trace).max()),
    }


def gap_cv(times_s: np.ndarray) -> float:
    """Coefficient of variation of the gaps between arrivals; NaN for fewer than three of them."""
    gaps = np.diff(times_s)
    return float(gaps.std() / gaps.mean()) if len(gaps) > 1 and gaps.mean() > 0 else float("nan")


def model_gap_cv(trace: Trace) -> float:
    """The gaps' CV of the model that is asked most."""
    top = int(np.argmax(model_counts(trace)))
    return gap_cv(trace.arrival_s[trace.model == top])


def model_counts(trace: Trace) -> np.ndarray:
    """Requests [M] of each model."""
    return np.bincount(trace.model, minlength=len(trace.models))


def cold_share(tokens: np.ndarray, cold: float = COLD) -> float:
    """Share of all tokens that the coldest `cold` of the models take, by what was asked of them."""
    coldest = np.sort(tokens)[: cold_models(len(tokens), cold)]
    return float(coldest.sum() / tokens.sum()) if tokens.sum() else float("nan")


def length_statistics(tokens: np.ndarray) -> dict[str, float]:
    """Mean, percentiles (the smallest value that so many do not exceed) and maximum; NaN for an empty trace."""
    if not len(tokens):
        return {key: float("nan") for key in ("mean", *(f"p{p}" for p in PERCENTILES), "max")}
    found = np.percentile(tokens, PERCENTILES, method="inverted_cdf")
    named = {f"p{p}": int(value) for p, value in zip(PERCENTILES, found, strict=True)}
    return {"mean": float(tokens.mean()), **named, "max": int(tokens.max())}


def correlation(prompt: np.ndarray, output: np.ndarray) -> float:
    """Pearson's, NaN where a length does not vary."""
    if len(prompt) < 2 or prompt.std() == 0 or output.std() == 0:
        return float("nan")
    return float(np.corrcoef(prompt, output)[0, 1])


def active_over_time(trace: Trace, window_s: float) -> np.ndarray:
    """Models asked at least once in each window [W] of `window_s`; a shorter rest at the end is left out."""
    windows = max(1, int(trace.duration_s / window_s))
    window = (trace.arrival_s / window_s).astype(np.int64)
    inside = window < windows
    pairs = np.unique(window[inside] * len(trace.models) + trace.model[inside])
    return np.bincount(pairs // len(trace.models), minlength=windows)


def rate_over_time(trace: Trace, window_s: float) -> np.ndarray:
    """Requests a second in each window [W] of `window_s`."""
    windows = max(1, int(trace.duration_s / window_s))
    return np.histogram(trace.arrival_s, bins=windows, range=(0, windows * window_s))[0] / window_s
