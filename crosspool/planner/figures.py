"""A plan in pictures: demand with its quantiles and budget, overflow against quantile, bars of the layout; with their
data.

Each figure is written as PNG, PDF and the CSV that it was drawn from.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure

from crosspool.planner.plan import Plan

_GIB = 1 << 30
_QUANTILES = np.concatenate([np.linspace(0.5, 0.9, 9), 1 - np.logspace(-1, -3, 21)[1:]])


def draw(plan: Plan, directory: Path) -> list[Path]:
    """Draw all figures of `plan` into `directory`, made where missing. Returns the files."""
    directory.mkdir(parents=True, exist_ok=True)
    drawings = [("demand", _demand), ("overflow", _overflow), ("layout", _layout)]
    return [path for name, drawing in drawings for path in _save(plan, directory / name, drawing)]


def _save(plan: Plan, stem: Path, drawing) -> Iterator[Path]:
    figure = Figure(figsize=(6.4, 3.8), layout="constrained")
    header, rows = drawing(plan, figure.subplots())
    for suffix in (".png", ".pdf"):
        figure.savefig(stem.with_suffix(suffix), dpi=160)
        yield stem.with_suffix(suffix)
    with stem.with_suffix(".csv").open("w", newline="") as file:
        csv.writer(file).writerows([header, *rows])
    yield stem.with_suffix(".csv")


def _demand(plan: Plan, axes) -> tuple[Sequence[str], list[tuple]]:
    """Histogram of the drawn demand. The budget is its last quantile; the pool's memory is drawn where it is in
    reach."""
    estimate, page_bytes = plan.estimate, plan.config.page_bytes
    counts, edges = np.histogram(estimate.samples_pages, bins=80)
    axes.stairs(counts / estimate.observations, edges * page_bytes / _GIB, fill=True, color="0.75")
    axes.axvline(estimate.mean_pages * page_bytes / _GIB, color="black", linewidth=1, label="mean")
    for quantile, color in zip(plan.config.quantiles, _colors(len(plan.config.quantiles)), strict=True):
        pages = estimate.pages_at(quantile)
        label = f"P{100 * quantile:g}" + (" = page budget" if quantile == estimate.quantile else "")
        axes.axvline(pages * page_bytes / _GIB, color=color, label=label)
    low, high = (pages * page_bytes / _GIB for pages in (estimate.low_pages, estimate.high_pages))
    axes.axvspan(low, high, color=_colors(len(plan.config.quantiles))[-1], alpha=0.2, linewidth=0)
    pool = plan.layout.kv_bytes / _GIB
    if pool <= 2 * axes.get_xlim()[1]:
        axes.axvline(pool, color="tab:red", linestyle="--", label="KV pool's memory")
    axes.set(xlabel="KV demand at a random time, whole pages (GiB)", ylabel="share of observation times")
    axes.legend(frameon=False)
    return ("from_pages", "to_pages", "share"), list(
        zip(edges[:-1], edges[1:], counts / estimate.observations, strict=True)
    )


def _overflow(plan: Plan, axes) -> tuple[Sequence[str], list[tuple]]:
    """Overflow against quantile: what a budget promises, what a normal approximation of it would give, and what time
    that was not fitted on showed."""
    estimate = plan.estimate
    rows = [
        ("drawn", "plan", q, estimate.pages_at(q), 1 - q, estimate.overflow_probability(estimate.pages_at(q)))
        for q in _QUANTILES.tolist()
    ]
    axes.plot(1 - _QUANTILES, [row[5] for row in rows], color="black", label="drawn (the plan itself)")
    normal = [plan.moments.normal_quantile(q) for q in _QUANTILES.tolist()]
    rows += [
        ("drawn", "normal", q, pages, 1 - q, estimate.overflow_probability(pages))
        for q, pages in zip(_QUANTILES.tolist(), normal, strict=True)
    ]
    axes.plot(
        1 - _QUANTILES,
        [row[5] for row in rows[len(normal) :]],
        color="tab:red",
        linestyle="--",
        label="drawn, budget by closed-form normal",
    )
    axes.fill_between([1e-3, 0.5], [5e-4, 0.25], [2e-3, 1.0], color="0.9", label="within a factor of two")
    observed = [(c.how, c.fit, c.quantile, c.budget_pages, c.promise, c.observed) for c in plan.checks]
    shown = [c for c in plan.checks if c.fit == "dispersed" or c.how == "shuffled"]
    kinds = list(dict.fromkeys((c.how, c.fit) for c in shown))
    for index, kind in enumerate(kinds):
        points = [c for c in shown if (c.how, c.fit) == kind]
        beside = [c.promise * 1.1 ** (index - (len(kinds) - 1) / 2) for c in points]  # apart, to be told apart
        color = colormaps["tab10"].colors[index % 10]
        axes.vlines(beside, [max(c.low, 1e-4) for c in points], [c.high for c in points], color=color, linewidth=1)
        axes.plot(beside, [c.observed for c in points], "o", color=color, label=f"observed: {kind[0]}, {kind[1]}")
    axes.set(xscale="log", yscale="log", xlabel="promised overflow, 1 - quantile", ylabel="overflow probability")
    axes.legend(frameon=False, fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
    return ("check", "fit", "quantile", "budget_pages", "promised", "observed"), rows + observed


def _layout(plan: Plan, axes) -> tuple[Sequence[str], list[tuple]]:
    """One bar a device: weights by model, workspace, KV; a line at the device's memory."""
    loads = (*plan.layout.kv, *plan.layout.weights)
    names = [model.config.name for model in plan.models]
    bottoms, rows = np.zeros(len(loads)), []
    parts = [(f"weights of {n}", [load.weights_bytes.get(n, 0) for load in loads]) for n in names]
    parts += [("workspace", [load.workspace_bytes for load in loads]), ("KV", [load.kv_bytes for load in loads])]
    labels = [f"{load.device.name}\n{load.role.removesuffix('-pool')}" for load in loads]
    for (part, sizes), color in zip(parts, [*_colors(len(names)), "0.6", "0.85"], strict=True):
        axes.bar(labels, np.array(sizes) / _GIB, bottom=bottoms / _GIB, color=color, label=part)
        bottoms += sizes
        rows += [(load.device.name, load.role, part, size) for load, size in zip(loads, sizes, strict=True)]
    memory = [load.device.memory_bytes / _GIB for load in loads]
    axes.hlines(memory, np.arange(len(loads)) - 0.45, np.arange(len(loads)) + 0.45, color="tab:red", label="memory")
    axes.set(ylabel="GiB")
    axes.legend(frameon=False, fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
    return ("device", "role", "part", "bytes"), rows


def _colors(count: int) -> list[tuple[float, ...]]:
    return [colormaps["viridis"](value) for value in np.linspace(0, 0.85, count)]
