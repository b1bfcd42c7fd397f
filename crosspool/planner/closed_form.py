"""Exact mean and variance of a KV pool's demand, where arrivals are Poisson: what the Monte Carlo must agree with.

M/G/infinity is a shot-noise process: by Campbell's theorem a shot h over ages [0, T) at rate L gives mean L * E[int
h] and variance L * E[int h^2]. A mixed rate (factors G of mean 1) adds Var(G) * mean^2."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from crosspool.planner.demand import ModelDemand
from crosspool.planner.growth import staircase


@dataclass(frozen=True)
class Moments:
    """Mean and variance of a demand, in pages or (for the raw form) bytes."""

    mean: float
    variance: float

    def normal_quantile(self, quantile: float) -> float:
        """The quantile if many small, independent requests made the demand normal; for cold pools it falls short."""
        return self.mean + NormalDist().inv_cdf(quantile) * self.variance**0.5


def kv_bytes_moments(models: Sequence[ModelDemand]) -> Moments:
    """Moments of the demand in bytes, before any rounding: per request k * T * (p + o/2) and k^2 * T * (p^2 + po +
    o^2/3)."""
    mean = variance = 0.0
    for model in models:
        prompt, output = model.prompt_tokens.astype(float), model.output_tokens.astype(float)
        first = np.mean(model.service_s * (prompt + output / 2)) * model.token_bytes
        second = np.mean(model.service_s * (prompt**2 + prompt * output + output**2 / 3)) * model.token_bytes**2
        mean, variance = _add(model, first, second, mean, variance)
    return Moments(mean, variance)


def page_moments(models: Sequence[ModelDemand], page_bytes: int, holding: str = "grown") -> Moments:
    """Moments of the demand in pages, rounding included: integrals over each request's staircase."""
    mean = variance = 0.0
    for model in models:
        steps = staircase(model, page_bytes, holding)
        time_s = (steps.end - steps.start) * model.service_s[steps.sample] / model.service_s.size
        first, second = float(time_s @ steps.pages), float(time_s @ np.square(steps.pages.astype(float)))
        mean, variance = _add(model, first, second, mean, variance)
    return Moments(mean, variance)


def _add(model: ModelDemand, first: float, second: float, mean: float, variance: float) -> tuple[float, float]:
    model_mean = model.rate_rps * first
    spread = float(np.var(model.rate_factors)) * model_mean**2
    return mean + model_mean, variance + model.rate_rps * second + spread
