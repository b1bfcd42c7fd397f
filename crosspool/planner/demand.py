"""The page budget of a KV pool: Monte Carlo of what all models hold at a random observation time (paper, "Planner").

A request of age u in [0, T) holds prompt + output * u/T tokens. With Poisson arrivals of rate L the number of live
requests at a random time is Poisson with mean L * E[T], and a live request is a joint sample (prompt, output, T)
drawn with weight T (a long service is seen more often) at an age uniform in [0, T): the stationary M/G/infinity
queue. Sampling prompt, output and T jointly keeps their correlation. Where arrivals are burstier than Poisson,
`rate_factors` mix the rate (see :mod:`crosspool.planner.dispersion`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from crosspool.planner.quantile import order_statistic_interval
from serving.errors import UserError

HOLDINGS = ("grown", "declared")
BURSTS = ("apart", "together")
_CHUNK_REQUESTS = 1 << 19  # live requests of one model drawn at once: bounds memory at some 20 MB
_FIRST_REQUESTS, _LEAST_OBSERVATIONS = 200_000, 2048
_SPLIT_OBSERVATIONS = 2048  # kept by model, for the models' own quantiles


@dataclass(frozen=True, eq=False)
class ModelDemand:
    """One model's load, as joint samples [S] of prompt tokens, output tokens and service time in seconds.

    A request's KV is `num_runs` contiguous runs of `run_token_bytes` a token: one run a layer (times tensor-parallel
    ranks, each with its share of the heads), or one run a group of layers that share pages. `rate_factors` [F], of
    mean 1, are equally likely multiples of the rate; (1,) is a plain Poisson process. Raises UserError for numbers
    that make no load."""

    name: str
    rate_rps: float
    prompt_tokens: np.ndarray
    output_tokens: np.ndarray
    service_s: np.ndarray
    num_runs: int
    run_token_bytes: int
    rate_factors: np.ndarray = field(default_factory=lambda: np.ones(1))

    def __post_init__(self) -> None:
        for name, kind in (("prompt_tokens", np.int64), ("output_tokens", np.int64), ("service_s", np.float64)):
            object.__setattr__(self, name, np.asarray(getattr(self, name), dtype=kind))
        object.__setattr__(self, "rate_factors", np.asarray(self.rate_factors, dtype=np.float64))
        self._require_load()

    def _require_load(self) -> None:
        if not np.isfinite(self.rate_rps) or self.rate_rps < 0:
            raise UserError(f"{self.name}: rate {self.rate_rps} req/s; a rate is a number of at least 0")
        sizes = {self.prompt_tokens.shape, self.output_tokens.shape, self.service_s.shape}
        if len(sizes) != 1 or self.prompt_tokens.ndim != 1:
            raise UserError(f"{self.name}: prompt, output and service samples must be joint: one row a request")
        if not self.prompt_tokens.size:
            raise UserError(f"{self.name}: no samples of (prompt, output, service time); at least one is needed")
        if self.prompt_tokens.min() < 0 or self.output_tokens.min() < 0:
            raise UserError(f"{self.name}: a sample has a negative token count")
        if not (np.isfinite(self.service_s).all() and self.service_s.min() > 0):
            raise UserError(f"{self.name}: service time {self.service_s.min()} s; every service time must be above 0")
        if self.num_runs < 1 or self.run_token_bytes < 1:
            raise UserError(f"{self.name}: {self.num_runs} runs of {self.run_token_bytes} bytes a token hold no KV")
        factors = self.rate_factors
        if not factors.size or factors.min() < 0 or abs(factors.mean() - 1) > 1e-6:
            raise UserError(f"{self.name}: rate factors must be at least 0 and average 1")

    @property
    def live_requests(self) -> float:
        """Mean number of requests in service: the offered load L * E[T]."""
        return self.rate_rps * float(self.service_s.mean())

    @property
    def token_bytes(self) -> int:
        """KV that one token leaves in all runs."""
        return self.num_runs * self.run_token_bytes

    def pages(self, tokens: np.ndarray, page_bytes: int) -> np.ndarray:
        """Pages that requests of `tokens` whole tokens occupy; rounding is the virtualizer's, up to a page in every
        run."""
        return self.num_runs * -(-np.asarray(tokens) * self.run_token_bytes // page_bytes)


@dataclass(frozen=True)
class SamplingRule:
    """When to stop: once the 95 % interval of the quantile is within `relative_half_width` of it (or within one page)
    and at least `least_requests` live requests were drawn; `most_requests` ends a search that does not get there.

    `holding` says what a live request counts for: `grown` what it holds at its age (the paper), `declared` its final
    length from the start, which is what admission by declared cap reserves. `bursts` says whether models with rate
    factors burst `apart` (independently) or `together` (all at their same rank of factors: the worst case of a shared
    cause)."""

    relative_half_width: float = 0.02
    confidence: float = 0.95
    least_requests: int = 0
    most_requests: int = 1 << 26
    holding: str = "grown"
    bursts: str = "apart"

    def __post_init__(self) -> None:
        if self.holding not in HOLDINGS:
            raise UserError(f"unknown holding {self.holding!r}; known: {', '.join(HOLDINGS)}")
        if self.bursts not in BURSTS:
            raise UserError(f"unknown bursts {self.bursts!r}; known: {', '.join(BURSTS)}")
        if not 0 < self.relative_half_width < 1 or not 0 < self.confidence < 1:
            raise UserError("relative_half_width and confidence must lie between 0 and 1")


@dataclass(frozen=True, eq=False)
class BudgetEstimate:
    """A pool's page budget, and how well it is known. `samples_pages` [observations] are the draws, ascending."""

    quantile: float
    page_bytes: int
    budget_pages: int
    low_pages: int  # of the confidence interval
    high_pages: int
    mean_pages: float
    mean_kv_bytes: float  # before rounding to pages
    requests: int  # live requests drawn
    converged: bool
    samples_pages: np.ndarray
    split_pages: np.ndarray  # [models, some observations], for the models' own quantiles
    models: tuple[str, ...]

    @property
    def budget_bytes(self) -> int:
        return self.budget_pages * self.page_bytes

    @property
    def observations(self) -> int:
        return self.samples_pages.size

    @property
    def relative_half_width(self) -> float:
        return (self.high_pages - self.low_pages) / 2 / max(self.budget_pages, 1)

    @property
    def rounding_loss(self) -> float:
        """Share of the pages in use, on average, that no token fills."""
        return 1 - self.mean_kv_bytes / (self.mean_pages * self.page_bytes) if self.mean_pages else 0.0

    def pages_at(self, quantile: float) -> int:
        """The demand's `quantile` in the same draws."""
        return quantile_pages(self.samples_pages, quantile)

    def overflow_probability(self, budget_pages: float) -> float:
        """Share of observation times whose demand exceeds `budget_pages`."""
        return 1 - np.searchsorted(self.samples_pages, budget_pages, side="right") / self.observations

    def own_pages(self) -> dict[str, int]:
        """Each model's own quantile: the budgets that partitions, one a model, would need for the same promise."""
        rows = np.sort(self.split_pages, axis=1)
        return {name: quantile_pages(row, self.quantile) for name, row in zip(self.models, rows, strict=True)}


def quantile_pages(ascending: np.ndarray, quantile: float) -> int:
    """The smallest drawn demand that at least a share `quantile` of the draws does not exceed."""
    return int(ascending[min(max(int(np.ceil(ascending.size * quantile)) - 1, 0), ascending.size - 1)])


class _Sampler:
    """Draws one model's demand at independent observation times."""

    def __init__(self, model: ModelDemand, page_bytes: int, holding: str, seed: np.random.SeedSequence) -> None:
        self.model, self._page_bytes, self._holding = model, page_bytes, holding
        self._random = np.random.default_rng(seed)
        weight = np.cumsum(model.service_s)
        self._cumulative = weight / weight[-1]
        self._factors = np.sort(model.rate_factors)
        self._prompt, self._output = model.prompt_tokens, model.output_tokens
        self.requests = 0
        self.tokens = 0

    def draw(self, ranks: np.ndarray) -> np.ndarray:
        """Pages held at `len(ranks)` observation times; `ranks` in [0, 1) pick the rate factor of each."""
        load = self.model.live_requests
        if load == 0:
            return np.zeros(ranks.size, dtype=np.int64)
        step = max(1, int(_CHUNK_REQUESTS / max(load, 1)))
        return np.concatenate([self._draw(ranks[i : i + step], load) for i in range(0, ranks.size, step)])

    def _draw(self, ranks: np.ndarray, load: float) -> np.ndarray:
        factor = self._factors[(ranks * self._factors.size).astype(np.int64)]
        live = self._random.poisson(load * factor)
        total = int(live.sum())
        if not total:
            return np.zeros(ranks.size, dtype=np.int64)
        sample = np.searchsorted(self._cumulative, self._random.random(total), side="right")
        sample = np.minimum(sample, self._cumulative.size - 1)  # the last cumulative weight may round below 1
        age = self._random.random(total) if self._holding == "grown" else 1.0
        tokens = np.ceil(self._prompt[sample] + self._output[sample] * age).astype(np.int64)
        self.requests += total
        self.tokens += int(tokens.sum())
        held = self.model.pages(tokens, self._page_bytes)
        observation = np.repeat(np.arange(ranks.size), live)
        return np.bincount(observation, weights=held, minlength=ranks.size).astype(np.int64)


class DemandSimulation:
    """Draws of a pool's demand that can be added to; :func:`kv_budget_pages` asks for more until the quantile is
    known."""

    def __init__(self, models: Sequence[ModelDemand], page_bytes: int, seed: int, rule: SamplingRule) -> None:
        if not models:
            raise UserError("no models to plan for; at least one is needed")
        if page_bytes < 1:
            raise UserError(f"page of {page_bytes} bytes; a page has at least one")
        # One stream a model, so that adding observations or models leaves the others' draws as they were.
        streams = np.random.SeedSequence(seed).spawn(len(models) + 1)
        self._ranks = np.random.default_rng(streams[0])
        self._rule = rule
        self._samplers = [
            _Sampler(model, page_bytes, rule.holding, stream) for model, stream in zip(models, streams[1:], strict=True)
        ]
        self.live_requests = sum(model.live_requests for model in models)
        self.pages = np.zeros(0, dtype=np.int64)
        self.split_pages = np.zeros((len(models), 0), dtype=np.int32)

    @property
    def requests(self) -> int:
        return sum(sampler.requests for sampler in self._samplers)

    @property
    def kv_bytes(self) -> int:
        return sum(sampler.tokens * sampler.model.token_bytes for sampler in self._samplers)

    def observe(self, count: int) -> None:
        """Add `count` observation times."""
        shared = self._ranks.random(count) if self._rule.bursts == "together" else None
        pages = np.zeros(count, dtype=np.int64)
        keep = min(count, _SPLIT_OBSERVATIONS - self.split_pages.shape[1])
        split = np.zeros((len(self._samplers), keep), dtype=np.int32)
        for index, sampler in enumerate(self._samplers):
            held = sampler.draw(self._ranks.random(count) if shared is None else shared)
            pages += held
            split[index] = held[:keep]
        self.pages = np.concatenate([self.pages, pages])
        self.split_pages = np.concatenate([self.split_pages, split], axis=1)


def kv_budget_pages(
    models: Sequence[ModelDemand],
    page_bytes: int,
    quantile: float = 0.99,
    seed: int = 0,
    rule: SamplingRule | None = None,
) -> BudgetEstimate:
    """Pages that a pool needs so that, at a random time, a share `quantile` of the time all live requests fit.

    Observation times are added until `rule` is met; the result says whether it was. Same arguments, same result. Raises
    UserError for a quantile outside (0, 1), for no models, or for a load without requests.
    """
    if not 0 < quantile < 1:
        raise UserError(f"quantile {quantile} is outside (0, 1); 0.95 and 0.99 are usual")
    rule = rule or SamplingRule()
    simulation = DemandSimulation(models, page_bytes, seed, rule)
    if simulation.live_requests == 0:
        raise UserError("no model has a rate above 0; there is no demand to plan for")
    tail = min(quantile, 1 - quantile)
    least = max(_LEAST_OBSERVATIONS, int(30 / tail))
    wanted = max(least, int(max(_FIRST_REQUESTS, rule.least_requests) / max(simulation.live_requests, 0.1)) + 1)
    while True:
        simulation.observe(wanted)
        ascending = np.sort(simulation.pages)
        low, high = order_statistic_interval(ascending, quantile, rule.confidence)
        budget = quantile_pages(ascending, quantile)
        known = (high - low) / 2 <= max(rule.relative_half_width * budget, 0.5)
        if known and simulation.requests >= rule.least_requests:
            break
        if simulation.requests + ascending.size >= rule.most_requests:
            break
        wanted = ascending.size  # twice as many in all
    return BudgetEstimate(
        quantile=quantile,
        page_bytes=page_bytes,
        budget_pages=budget,
        low_pages=low,
        high_pages=high,
        mean_pages=float(ascending.mean()),
        mean_kv_bytes=simulation.kv_bytes / ascending.size,
        requests=simulation.requests,
        converged=known,
        samples_pages=ascending,
        split_pages=simulation.split_pages,
        models=tuple(model.name for model in models),
    )
