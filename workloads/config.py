"""What a workload is, as frozen dataclasses. A description plus its seeds is a trace, the same one everywhere."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from workloads.errors import WorkloadError


@dataclass(frozen=True)
class Arrivals:
    """When requests come. `rate_rps` is the total over all models (`rate_of: total`) or of each (`rate_of: model`)."""

    kind: str = "poisson"
    rate_rps: float = 1.0
    rate_of: str = "total"


@dataclass(frozen=True)
class Popularity:
    """Which model is asked: shares proportional to rank^-alpha, in the order in which models are listed."""

    kind: str = "power_law"
    alpha: float = 0.0


@dataclass(frozen=True)
class Lengths:
    """Tokens of prompt and output: `fixed` at the maxima, or `uniform` between minimum and maximum."""

    kind: str = "uniform"
    prompt_min: int = 16
    prompt_max: int = 128
    output_min: int = 8
    output_max: int = 64


@dataclass(frozen=True)
class Seeds:
    """One seed for each choice, so that a sweep over one leaves the others as they are."""

    schedule: int = 0
    model: int = 0
    lengths: int = 0
    prompts: int = 0


@dataclass(frozen=True)
class WorkloadConfig:
    """A trace of `duration_s` seconds."""

    duration_s: float = 30.0
    arrivals: Arrivals = field(default_factory=Arrivals)
    popularity: Popularity = field(default_factory=Popularity)
    lengths: Lengths = field(default_factory=Lengths)
    seeds: Seeds = field(default_factory=Seeds)


def workload_from_dict(content: Mapping[str, Any]) -> WorkloadConfig:
    """The workload that a plain dict describes. Raises WorkloadError for unknown keys and values out of range."""
    parts = {"arrivals": Arrivals, "popularity": Popularity, "lengths": Lengths, "seeds": Seeds}
    built = {
        key: _build(parts[key], value, f"workload.{key}") if key in parts else value for key, value in content.items()
    }
    config = _build(WorkloadConfig, built, "workload")
    _validate(config)
    return config


def _build(cls: type, content: Any, where: str) -> Any:
    if not isinstance(content, Mapping):
        raise WorkloadError(f"{where}: a mapping is wanted, got {content!r}")
    known = [f.name for f in dataclasses.fields(cls)]
    for key in content:
        if key not in known:
            raise WorkloadError(f"{where}: unknown key {key!r}; known: {', '.join(known)}")
    return cls(**content)


def _positive(value: Any, where: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not (value > 0 and math.isfinite(value)):
        raise WorkloadError(f"{where} is {value!r}; it must be a positive number")


def _choice(value: Any, known: tuple[str, ...], where: str) -> None:
    if value not in known:
        raise WorkloadError(f"{where} is {value!r}; known: {', '.join(known)}")


def _validate(config: WorkloadConfig) -> None:
    _positive(config.duration_s, "workload.duration_s")
    _choice(config.arrivals.kind, ("poisson",), "workload.arrivals.kind")
    _choice(config.arrivals.rate_of, ("total", "model"), "workload.arrivals.rate_of")
    _positive(config.arrivals.rate_rps, "workload.arrivals.rate_rps")
    _choice(config.popularity.kind, ("power_law",), "workload.popularity.kind")
    if not (math.isfinite(config.popularity.alpha) and config.popularity.alpha >= 0):
        raise WorkloadError(f"workload.popularity.alpha is {config.popularity.alpha!r}; it must be 0 or more")
    _choice(config.lengths.kind, ("fixed", "uniform"), "workload.lengths.kind")
    for part in ("prompt", "output"):
        low, high = getattr(config.lengths, f"{part}_min"), getattr(config.lengths, f"{part}_max")
        if not 1 <= low <= high:
            raise WorkloadError(
                f"workload.lengths: {part}_min {low} and {part}_max {high} must be ordered and at least 1"
            )
