"""The planner's own speed: 1,000 models, 1,000,000 joint samples and at least as many live requests drawn."""

from __future__ import annotations

import resource
import time
from dataclasses import dataclass

import numpy as np

from crosspool.planner.closed_form import page_moments
from crosspool.planner.demand import ModelDemand, SamplingRule, kv_budget_pages

_MODELS, _SAMPLES, _REQUESTS = 1000, 1000, 1_000_000
_TOTAL_RPS, _PAGE_BYTES = 50.0, 2 << 20
_SECONDS, _MEMORY_BYTES, _HALF_WIDTH, _MEAN_ERROR = 10.0, 1e9, 0.02, 0.01


@dataclass(frozen=True)
class BenchResult:
    """What the budget of the synthetic service took. `memory_bytes` is the peak of the whole process."""

    seconds: float
    memory_bytes: float
    requests: int
    observations: int
    budget_pages: int
    half_width: float
    mean_error: float  # against the closed form

    @property
    def passed(self) -> bool:
        fast = self.seconds <= _SECONDS and self.memory_bytes <= _MEMORY_BYTES
        known = self.half_width <= _HALF_WIDTH and abs(self.mean_error) <= _MEAN_ERROR
        return fast and known and self.requests >= _REQUESTS

    def __str__(self) -> str:
        verdict = "PASS" if self.passed else "FAIL"
        return (
            f"{_MODELS} models, {self.requests} live requests at {self.observations} observation times: "
            f"{self.seconds:.2f} s (limit {_SECONDS:.0f}), "
            f"peak {self.memory_bytes / 1e6:.0f} MB (limit {_MEMORY_BYTES / 1e6:.0f})\n"
            f"P99 {self.budget_pages} pages, 95 % half width {self.half_width:.2%} (limit {_HALF_WIDTH:.0%}); "
            f"mean {self.mean_error:+.2%} from M/G/infinity (limit {_MEAN_ERROR:.0%}): {verdict}"
        )


def run_bench(seed: int = 0) -> BenchResult:
    """Plan a service of cold models: popularity as rank^-0.9, lognormal lengths, three KV geometries."""
    random = np.random.default_rng(seed)
    popularity = np.arange(1, _MODELS + 1) ** -0.9
    models = [_model(random, i, _TOTAL_RPS * popularity[i] / popularity.sum()) for i in range(_MODELS)]
    start = time.perf_counter()
    rule = SamplingRule(relative_half_width=_HALF_WIDTH, least_requests=_REQUESTS)
    estimate = kv_budget_pages(models, _PAGE_BYTES, 0.99, seed, rule)
    seconds = time.perf_counter() - start
    return BenchResult(
        seconds=seconds,
        memory_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0,
        requests=estimate.requests,
        observations=estimate.observations,
        budget_pages=estimate.budget_pages,
        half_width=estimate.relative_half_width,
        mean_error=estimate.mean_pages / page_moments(models, _PAGE_BYTES).mean - 1,
    )


def _model(random: np.random.Generator, index: int, rate_rps: float) -> ModelDemand:
    prompt = np.maximum(random.lognormal(6.0, 1.0, _SAMPLES), 1).astype(np.int64)
    output = np.maximum(random.lognormal(5.0, 0.8, _SAMPLES), 1).astype(np.int64)
    num_layers, token_bytes = ((27, 1152), (48, 2048), (47, 1152))[index % 3]
    return ModelDemand(f"model{index}", rate_rps, prompt, output, 0.2 + 0.04 * output, num_layers, token_bytes)
