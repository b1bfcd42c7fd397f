"""Draws a trace: arrivals, popularity, lengths and active models, with what was expected where it is known."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from workloads.columnar import Trace
from workloads.errors import WorkloadError
from workloads.statistics import active_over_time, model_counts, rate_over_time

_BLUE, _ORANGE, _GREY = "#0072B2", "#E69F00", "#7F7F7F"  # told apart with colour-vision deficiencies (Okabe and Ito)
_BARS = 24  # up to so many models have a bar each


def draw(trace: Trace, window_s: float, path: Path) -> None:
    """Write the figure to `path` (.png, .pdf or .svg). Raises WorkloadError where it cannot be written."""
    figure = Figure(figsize=(9, 6), layout="constrained")
    axes = figure.subplots(2, 2)
    _arrivals(axes[0, 0], trace, window_s)
    _popularity(axes[0, 1], trace)
    _lengths(axes[1, 0], trace)
    _active(axes[1, 1], trace, window_s)
    for panel in axes.flat:
        panel.spines[["top", "right"]].set_visible(False)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=150)
    except (OSError, ValueError) as error:
        raise WorkloadError(f"{path}: the figure cannot be written ({error})") from None


def _arrivals(axes: Axes, trace: Trace, window_s: float) -> None:
    rates = rate_over_time(trace, window_s)
    axes.stairs(rates, np.arange(len(rates) + 1) * window_s, color=_BLUE, label="measured")
    promised = (trace.made.get("expected") or {}).get("rate_rps")
    if promised:
        axes.axhline(promised, color=_ORANGE, linestyle="--", label="expected mean")
    axes.set(xlabel="time (s)", ylabel=f"req/s in {window_s:g} s", title="Arrivals", ylim=(0, None))
    axes.legend(frameon=False)


def _popularity(axes: Axes, trace: Trace) -> None:
    counts = model_counts(trace)
    promised = trace.made.get("expected_shares") or {}
    wanted = np.array([promised.get(limits.name, np.nan) for limits in trace.models])
    order = np.argsort(-counts if np.isnan(wanted).any() else -wanted, kind="stable")
    shares, wanted, ranks = counts[order] / max(counts.sum(), 1), wanted[order], np.arange(1, len(counts) + 1)
    if len(counts) <= _BARS:
        axes.bar(ranks, shares, color=_BLUE, label="measured")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    else:
        axes.plot(ranks, np.where(shares > 0, shares, np.nan), ".", color=_BLUE, markersize=3, label="measured")
        axes.set(xscale="log", yscale="log")
    if not np.isnan(wanted).all():
        axes.plot(ranks, wanted, "_" if len(counts) <= _BARS else "-", color=_ORANGE, markersize=14, label="expected")
    axes.set(xlabel="model, by rank", ylabel="share of requests", title="Popularity")
    axes.legend(frameon=False)


def _lengths(axes: Axes, trace: Trace) -> None:
    for tokens, color, name, line in (
        (trace.prompt_tokens, _BLUE, "prompt", "-"),
        (trace.output_tokens, _ORANGE, "output", "--"),
    ):
        values, counts = np.unique(tokens, return_counts=True)
        if len(values):
            at_most = np.append(0, counts.cumsum() / counts.sum())
            axes.step(np.append(values[0], values), at_most, where="post", color=color, linestyle=line, label=name)
    axes.set(xscale="log", xlabel="tokens", ylabel="share of requests up to it", title="Lengths", ylim=(0, 1))
    axes.legend(frameon=False)


def _active(axes: Axes, trace: Trace, window_s: float) -> None:
    active = active_over_time(trace, window_s)
    axes.stairs(active, np.arange(len(active) + 1) * window_s, color=_BLUE)
    axes.axhline(len(trace.models), color=_GREY, linestyle=":", linewidth=1)
    axes.set(xlabel="time (s)", ylabel=f"models asked in {window_s:g} s", title="Active models", ylim=(0, None))
