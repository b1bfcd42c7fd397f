"""Which model is asked how often: shares of the load by model, in the order in which models are listed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from workloads.config import Popularity
from workloads.errors import WorkloadError
from workloads.validate import ALPHA_MAX

_BISECTIONS = 60


def model_shares(popularity: Popularity, names: Sequence[str], rng: np.random.Generator) -> np.ndarray:
    """Shares [M] that sum to 1. `rng` is read by `dirichlet` only. Raises WorkloadError, for an unknown model too."""
    if popularity.kind == "dirichlet":
        return np.sort(rng.dirichlet(np.full(len(names), popularity.concentration)))[::-1]
    if popularity.kind == "shares":
        return _scaled(_measured(popularity.shares, names))
    if popularity.kind == "tail":
        return power_law(len(names), tail_alpha(len(names), popularity.tail_models, popularity.tail_tokens))
    return power_law(len(names), popularity.alpha)


def total_rate(popularity: Popularity, rate_rps: float, shares: np.ndarray) -> float:
    """Requests a second over all models. Only MuxServe's variant, which fixes the top model's rate, changes it."""
    return rate_rps / float(shares[0]) if popularity.kind == "power_law_top" else rate_rps


def power_law(models: int, alpha: float) -> np.ndarray:
    """Shares [models] proportional to rank^-alpha."""
    return _scaled(np.arange(1, models + 1, dtype=np.float64) ** -alpha)


def cold_models(models: int, fraction: float) -> int:
    """How many models are the coldest `fraction` of them: one stays hot at least."""
    return min(models - 1, round(fraction * models))


def tail_alpha(models: int, tail_models: float, tail_tokens: float) -> float:
    """The power law whose coldest `tail_models` of the models take `tail_tokens` of the load. All requests have lengths of
    the same law, so that shares of requests are shares of tokens. Raises WorkloadError where no alpha does it."""
    cold = cold_models(models, tail_models)
    if cold < 1:
        return 0.0

    def share(alpha: float) -> float:
        return float(power_law(models, alpha)[-cold:].sum())

    low, high = 0.0, ALPHA_MAX
    if not share(high) <= tail_tokens <= share(low):
        raise WorkloadError(
            f"workload.popularity.tail_tokens is {tail_tokens}; the coldest {cold} of {models} models can take between "
            f"{share(high):.3g} and {share(low):.3g}"
        )
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        low, high = (middle, high) if share(middle) > tail_tokens else (low, middle)
    return (low + high) / 2


def assign(shares: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """A model index [count] int32 for each request, independent draws. One uniform number a request: under another
    popularity the same seed gives each request a model of about the same rank."""
    edges = shares.cumsum()
    return np.searchsorted(edges[:-1] / edges[-1], rng.random(count), side="right").astype(np.int32)


def _measured(shares: Mapping[str, float] | Sequence[float], names: Sequence[str]) -> np.ndarray:
    if not isinstance(shares, Mapping):
        if len(shares) != len(names):
            raise WorkloadError(f"workload.popularity.shares: {len(shares)} shares for {len(names)} models")
        return np.array(shares, dtype=np.float64)
    for name in shares:
        if name not in names:
            raise WorkloadError(f"workload.popularity.shares: unknown model {name!r}; known: {', '.join(names)}")
    return np.array([shares.get(name, 0.0) for name in names], dtype=np.float64)


def _scaled(weights: np.ndarray) -> np.ndarray:
    return weights / weights.sum()
