"""Which values of a workload make sense. Every refusal is one line that names the key."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from workloads.config import Arrivals, Injection, Lengths, Popularity, Prompts, Source, WorkloadConfig
from workloads.errors import WorkloadError

ARRIVALS = ("poisson", "gamma", "bursts", "constant", "replay")
POPULARITY = ("power_law", "power_law_top", "dirichlet", "shares", "tail")
LENGTHS = ("fixed", "uniform", "lognormal", "bins", "empirical", "replay")
PROMPTS = ("random", "prefix", "blocks", "text", "none")
TEXT_FORMATS = ("sharegpt", "longalign")
FORMATS = ("azure", "mooncake", "burstgpt", "lengths", *TEXT_FORMATS)
CV_RANGE = (0.5, 8.0)
ALPHA_MAX = 10.0
_BIN = re.compile(r"(\d+)-(\d+)K")


def validate(config: WorkloadConfig) -> None:
    """Raises WorkloadError for the first value that makes no sense."""
    _number(config.duration_s, "workload.duration_s")
    _arrivals(config.arrivals)
    _popularity(config.popularity)
    _lengths(config.lengths)
    _prompts(config.prompts)
    _injection(config.injection, config.duration_s)
    _source(config.source)
    _together(config)
    for name in ("schedule", "model", "lengths", "prompts"):
        _integer(getattr(config.seeds, name), f"workload.seeds.{name}", low=0)


def bin_tokens(name: str) -> tuple[int, int]:
    """Smallest and largest context of a bin: `4-8K` is 4096 up to 8191 tokens. Raises WorkloadError."""
    match = _BIN.fullmatch(str(name))
    if not match or not int(match[1]) < int(match[2]):
        raise WorkloadError(f"workload.lengths.bins: {name!r} is no bin; write it like 4-8K or 64-128K")
    return int(match[1]) * 1024, int(match[2]) * 1024 - 1


def _arrivals(arrivals: Arrivals) -> None:
    _choice(arrivals.kind, ARRIVALS, "workload.arrivals.kind")
    _choice(arrivals.rate_of, ("total", "model"), "workload.arrivals.rate_of")
    _choice(arrivals.process_of, ("total", "model"), "workload.arrivals.process_of")
    _number(arrivals.rate_rps, "workload.arrivals.rate_rps")
    if arrivals.kind == "gamma":
        _number(arrivals.cv, "workload.arrivals.cv", *CV_RANGE)
    if arrivals.kind == "bursts":
        _number(arrivals.on_s, "workload.arrivals.on_s")
        _number(arrivals.off_s, "workload.arrivals.off_s")
        _number(arrivals.off_rate_fraction, "workload.arrivals.off_rate_fraction", 0.0, 1.0)
    if arrivals.kind == "replay":
        _number(arrivals.rate_scale, "workload.arrivals.rate_scale")
        if arrivals.process_of == "model":
            raise WorkloadError("workload.arrivals.process_of is 'model'; a replayed file is one process: use total")


def _popularity(popularity: Popularity) -> None:
    _choice(popularity.kind, POPULARITY, "workload.popularity.kind")
    if popularity.kind in ("power_law", "power_law_top"):
        _number(popularity.alpha, "workload.popularity.alpha", 0.0, ALPHA_MAX)
    if popularity.kind == "dirichlet":
        _number(popularity.concentration, "workload.popularity.concentration")
    if popularity.kind == "tail":
        for name in ("tail_models", "tail_tokens"):
            value = getattr(popularity, name)
            _number(value, f"workload.popularity.{name}")
            if value >= 1:
                raise WorkloadError(f"workload.popularity.{name} is {value!r}; it must lie between 0 and 1")
    if popularity.kind == "shares":
        shares = popularity.shares
        values = list(shares.values()) if isinstance(shares, Mapping) else shares
        if not isinstance(values, list | tuple) or not values:
            raise WorkloadError("workload.popularity.shares: give one share a model, as a list or by name")
        for value in values:
            _number(value, "workload.popularity.shares", 0.0)
        if not sum(values) > 0:
            raise WorkloadError("workload.popularity.shares: all are 0; one at least must be positive")


def _lengths(lengths: Lengths) -> None:
    _choice(lengths.kind, LENGTHS, "workload.lengths.kind")
    _number(lengths.scale, "workload.lengths.scale")
    for part in ("prompt", "output"):
        low, high = getattr(lengths, f"{part}_min"), getattr(lengths, f"{part}_max")
        _integer(low, f"workload.lengths.{part}_min", low=1)
        _integer(high, f"workload.lengths.{part}_max", low=1)
        if low > high and lengths.kind != "fixed":
            raise WorkloadError(f"workload.lengths: {part}_min {low} is larger than {part}_max {high}")
        if lengths.kind == "lognormal":
            _number(getattr(lengths, f"{part}_median"), f"workload.lengths.{part}_median")
            _number(getattr(lengths, f"{part}_sigma"), f"workload.lengths.{part}_sigma")
    if lengths.kind == "lognormal":
        _number(lengths.correlation, "workload.lengths.correlation", -1.0, 1.0)
    if not isinstance(lengths.bins, tuple):
        raise WorkloadError(f"workload.lengths.bins is {lengths.bins!r}; it must be a list such as [4-8K, 8-16K]")
    for name in lengths.bins:
        bin_tokens(name)
    if lengths.kind == "bins":
        if not lengths.bins:
            raise WorkloadError("workload.lengths.bins is empty; name one bin at least, such as [4-8K]")
        least = min(bin_tokens(name)[0] for name in lengths.bins)
        if lengths.output_max >= least:
            raise WorkloadError(
                f"workload.lengths.output_max is {lengths.output_max}; it must be below {least}, the smallest context"
            )


def _prompts(prompts: Prompts) -> None:
    _choice(prompts.kind, PROMPTS, "workload.prompts.kind")
    if prompts.kind == "prefix":
        _integer(prompts.prefix_tokens, "workload.prompts.prefix_tokens", low=1)
        _integer(prompts.prefix_groups, "workload.prompts.prefix_groups", low=1)
        _number(prompts.prefix_share, "workload.prompts.prefix_share", 0.0, 1.0)


def _injection(injection: Injection, duration_s: float) -> None:
    _integer(injection.requests, "workload.injection.requests", low=0)
    if not injection.requests:
        return
    _number(injection.at_s, "workload.injection.at_s", 0.0)
    _number(injection.over_s, "workload.injection.over_s")
    _integer(injection.prompt_tokens, "workload.injection.prompt_tokens", low=1)
    _integer(injection.output_tokens, "workload.injection.output_tokens", low=1)
    if injection.at_s + injection.over_s > duration_s:
        raise WorkloadError(
            f"workload.injection: at_s {injection.at_s} + over_s {injection.over_s} lies past duration_s {duration_s}"
        )


def _source(source: Source) -> None:
    if source.format:
        _choice(source.format, FORMATS, "workload.source.format")
    _integer(source.max_rows, "workload.source.max_rows", low=0)


def _together(config: WorkloadConfig) -> None:
    """What one part asks of another."""
    replayed = config.arrivals.kind == "replay"
    wants = [name for name in ("lengths", "prompts") if getattr(config, name).kind in ("empirical", "replay", "text")]
    wants += ["prompts"] if config.prompts.kind == "blocks" else []
    wants += ["arrivals"] if replayed else []
    if wants and not (config.source.format and config.source.path):
        raise WorkloadError(f"workload.{wants[0]} is taken from a source: give workload.source.format and .path")
    if replayed and config.source.format in ("lengths", *TEXT_FORMATS):
        raise WorkloadError(f"workload.arrivals.kind is 'replay', but {config.source.format} has no arrival times")
    if config.lengths.kind == "replay" and not replayed:
        raise WorkloadError(
            "workload.lengths.kind is 'replay'; that needs workload.arrivals.kind=replay (or: empirical)"
        )
    if config.prompts.kind == "blocks" and (config.source.format != "mooncake" or config.lengths.kind != "replay"):
        raise WorkloadError("workload.prompts.kind is 'blocks'; that needs lengths.kind=replay of a mooncake source")
    if config.prompts.kind == "blocks" and config.lengths.scale != 1:
        raise WorkloadError(
            "workload.prompts.kind is 'blocks'; hashes stand for unscaled lengths: lengths.scale must be 1"
        )
    if config.prompts.kind == "text" and not (
        config.source.format in TEXT_FORMATS and config.lengths.kind == "empirical"
    ):
        raise WorkloadError(
            f"workload.prompts.kind is 'text'; that needs lengths.kind=empirical of {' or '.join(TEXT_FORMATS)}"
        )
    if config.prompts.kind == "text" and config.lengths.scale != 1:
        raise WorkloadError("workload.prompts.kind is 'text'; text cannot be scaled: lengths.scale must be 1")


def _number(value: Any, where: str, low: float | None = None, high: float = math.inf) -> None:
    """A finite number: positive, or within [low, high] where `low` is given."""
    good = not isinstance(value, bool) and isinstance(value, int | float) and math.isfinite(value)
    if low is None and not (good and value > 0):
        raise WorkloadError(f"{where} is {value!r}; it must be a positive number")
    if low is not None and not (good and low <= value <= high):
        limits = f"between {low:g} and {high:g}" if math.isfinite(high) else f"a number of {low:g} or more"
        raise WorkloadError(f"{where} is {value!r}; it must be {limits}")


def _integer(value: Any, where: str, low: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        raise WorkloadError(f"{where} is {value!r}; it must be a whole number of {low} or more")


def _choice(value: Any, known: tuple[str, ...], where: str) -> None:
    if value not in known:
        raise WorkloadError(f"{where} is {value!r}; known: {', '.join(known)}")
