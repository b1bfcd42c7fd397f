"""What a description promises, in closed form where there is one: held against what was drawn by `describe` and tests.

Laws of lengths are before a model's context clips them, and without an injected burst.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from workloads.arrivals import burst_rates
from workloads.config import Arrivals, Lengths, WorkloadConfig
from workloads.lengths import lognormal_mass, rows_in_bins, scaled
from workloads.sources import SourceRows
from workloads.validate import bin_tokens

PERCENTILES = (50, 90, 95, 99)
Law = tuple[np.ndarray, np.ndarray]  # values in ascending order, their probabilities


def expected(config: WorkloadConfig, rate_rps: float, shares: np.ndarray, source: SourceRows | None) -> dict[str, Any]:
    """Plain numbers for a record; None where only the file knows."""
    one_process = config.arrivals.process_of == "total" or len(shares) == 1
    laws = length_laws(config.lengths, source)
    replayed = config.arrivals.kind == "replay"
    rates = rate_rps * (shares if config.arrivals.process_of == "model" else np.ones(1))
    variance = (
        0.0 if replayed else sum(rate * count_dispersion(config.arrivals, rate) for rate in rates.tolist() if rate)
    )
    return {
        "rate_rps": None if replayed else rate_rps,
        "rate_std_rps": None if replayed else float(np.sqrt(variance / config.duration_s)),
        "independent_choices": config.arrivals.process_of == "total" or config.arrivals.kind == "poisson",
        "gap_cv": gap_cv(config.arrivals, rate_rps) if one_process or config.arrivals.kind == "poisson" else None,
        "prompt_tokens": law_statistics(laws["prompt"]) if laws else None,
        "output_tokens": law_statistics(laws["output"]) if laws else None,
    }


def gap_cv(arrivals: Arrivals, rate_rps: float) -> float | None:
    """CV of the gaps between the arrivals of one process, None where the file decides.

    On/off bursts are a Poisson process whose rate switches between two values after exponential times; their gaps have the
    moments of a Markov-modulated Poisson process (Fischer and Meier-Hellstern, 1993, section 2)."""
    if arrivals.kind == "replay":
        return None
    if arrivals.kind == "gamma":
        return arrivals.cv
    if arrivals.kind == "bursts":
        return _burst_gap_cv(arrivals, rate_rps)
    return {"poisson": 1.0, "constant": 0.0}[arrivals.kind]


def count_dispersion(arrivals: Arrivals, rate_rps: float) -> float:
    """Variance over mean of the number of arrivals in a long time: CV^2 for independent gaps; on/off bursts add that of
    the time spent in bursts (Fischer and Meier-Hellstern, 1993)."""
    if arrivals.kind == "bursts":
        within, between = burst_rates(arrivals, rate_rps)
        leave_on, leave_off = 1 / arrivals.on_s, 1 / arrivals.off_s
        mixing = leave_on * leave_off / ((leave_on + leave_off) ** 2 * (within * leave_off + between * leave_on))
        return 1 + 2 * (within - between) ** 2 * mixing
    return gap_cv(arrivals, rate_rps) ** 2


def active_models(rate_rps: float, shares: np.ndarray, window_s: float) -> float:
    """Models asked at least once in a window, on average, under Poisson arrivals: the sum of 1 - exp(-rate T), which for
    equal rates is Aegaeon's M (1 - exp(-lambda T))."""
    return float((1 - np.exp(-rate_rps * shares * window_s)).sum())


def length_laws(lengths: Lengths, source: SourceRows | None) -> dict[str, Law] | None:
    """The law of prompt and of output, None where a tokenizer decides."""
    if lengths.kind in ("empirical", "replay"):
        if source is None or source.texts is not None:
            return None
        rows = rows_in_bins(lengths, source.prompt_tokens, source.output_tokens)
        parts = {"prompt": source.prompt_tokens[rows], "output": source.output_tokens[rows]}
        return {part: _of_samples(scaled(values, lengths.scale)) for part, values in parts.items()}
    laws = {part: _part_law(lengths, part) for part in ("prompt", "output")}
    if lengths.kind == "bins":
        laws["prompt"] = _bin_prompts(lengths, laws["output"])
    return {part: (scaled(values, lengths.scale), shares) for part, (values, shares) in laws.items()}


def law_statistics(law: Law) -> dict[str, float]:
    """Mean, standard deviation and percentiles of a law."""
    values, shares = law
    mean = float(values @ shares)
    below = shares.cumsum()
    found = {f"p{p}": int(values[min(np.searchsorted(below, p / 100 - 1e-12), len(values) - 1)]) for p in PERCENTILES}
    return {"mean": mean, "std": float(np.sqrt((values.astype(float) - mean) ** 2 @ shares)), **found}


def _burst_gap_cv(arrivals: Arrivals, rate_rps: float) -> float:
    rates = np.array(burst_rates(arrivals, rate_rps))
    leave = np.array([1 / arrivals.on_s, 1 / arrivals.off_s])
    generator = np.array([[-leave[0], leave[0]], [leave[1], -leave[1]]])
    silent = np.linalg.inv(np.diag(rates) - generator)  # mean time in each state until the next arrival
    stationary = leave[::-1] / leave.sum()
    at_arrival = stationary * rates / (stationary @ rates)
    first = at_arrival @ silent @ np.ones(2)
    second = 2 * at_arrival @ silent @ silent @ np.ones(2)
    return float(np.sqrt(second / first**2 - 1))


def _part_law(lengths: Lengths, part: str) -> Law:
    low, high = getattr(lengths, f"{part}_min"), getattr(lengths, f"{part}_max")
    if lengths.kind == "fixed":
        return np.array([high]), np.ones(1)
    values = np.arange(low, high + 1)
    if lengths.kind == "lognormal":
        from scipy.special import ndtr

        median, sigma = getattr(lengths, f"{part}_median"), getattr(lengths, f"{part}_sigma")
        edges = (np.log(np.arange(low, high + 2) - 0.5) - np.log(median)) / sigma
        below, upto = lognormal_mass(median, sigma, low, high)
        return values, np.diff(ndtr(edges)) / (upto - below)
    return values, np.full(len(values), 1 / len(values))


def _bin_prompts(lengths: Lengths, output: Law) -> Law:
    """Prompt is context less output, and the two are independent: a convolution."""
    edges = [bin_tokens(name) for name in lengths.bins]
    least, most = min(low for low, _ in edges), max(high for _, high in edges)
    context = np.zeros(most - least + 1)
    for low, high in edges:
        context[low - least : high - least + 1] += 1 / (len(edges) * (high - low + 1))
    values = np.arange(least - output[0][-1], most - output[0][0] + 1)
    return values, np.convolve(context, output[1][::-1])


def _of_samples(samples: np.ndarray) -> Law:
    values, counts = np.unique(samples, return_counts=True)
    return values, counts / counts.sum()
