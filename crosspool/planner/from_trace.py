"""Demand from a trace: fitted on some spans of it, checked by exact sweep on spans it was not fitted on.

The plan promises that a pool of the P99 budget overflows 1 % of a *random* time. A trace tests that in three ways,
from mild to hard: `interleaved` and `shuffled` halves (blocks of both lie all over the trace, so that the observation
time is random over it, as the promise has it), `rolling` (each block planned from what came just before it: the
online planner) and the two halves in order (`first`, `second`: the load may have moved for good, which no offline
plan can know)."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from crosspool.planner.demand import BudgetEstimate, ModelDemand, kv_budget_pages
from crosspool.planner.dispersion import RateSpread, rate_spread
from crosspool.planner.quantile import block_bootstrap_interval
from crosspool.planner.sweep import DemandCurve, Span, demand_curve
from serving.errors import UserError

_WINDOW_SERVICE_TIMES = 2.0  # a live population mixes the arrivals of about this many mean service times
FITS = ("poisson", "dispersed", "empirical")


@dataclass(frozen=True)
class ServiceModel:
    """Service time of a request, where a trace has lengths only: `base_s` + prompt and output tokens times their
    cost."""

    base_s: float = 0.2
    prompt_token_s: float = 2e-4
    output_token_s: float = 0.04

    def __post_init__(self) -> None:
        if min(self.base_s, self.prompt_token_s, self.output_token_s) < 0:
            raise UserError("service times cannot be negative: base_s, prompt_token_s and output_token_s")

    def service_s(self, prompt_tokens: np.ndarray, output_tokens: np.ndarray) -> np.ndarray:
        return self.base_s + self.prompt_token_s * prompt_tokens + self.output_token_s * output_tokens


@dataclass(frozen=True, eq=False)
class TraceDemand:
    """A trace of one model: `arrivals_s` [S], ascending, and the joint samples of `model` in the same order (its rate
    is not read)."""

    arrivals_s: np.ndarray
    model: ModelDemand

    def __post_init__(self) -> None:
        arrivals = np.asarray(self.arrivals_s, dtype=float)
        object.__setattr__(self, "arrivals_s", arrivals)
        if arrivals.shape != self.model.service_s.shape or arrivals.size < 2:
            raise UserError(f"{self.model.name}: a trace needs one arrival a request, two requests at least")
        if (np.diff(arrivals) < 0).any():
            raise UserError(f"{self.model.name}: arrivals of a trace must be ascending")

    @property
    def span(self) -> Span:
        """The time in which the pool is in its steady state: past the ramp from an empty start (P99 of service
        time)."""
        ramp_s = float(np.quantile(self.model.service_s, 0.99))
        start, end = float(self.arrivals_s[0]) + ramp_s, float(self.arrivals_s[-1])
        if start >= end:
            raise UserError(f"{self.model.name}: the trace is shorter than a long service time ({ramp_s:.1f} s)")
        return start, end

    def curve(self, page_bytes: int) -> DemandCurve:
        return demand_curve(self.arrivals_s, self.model, page_bytes)

    def inside(self, spans: Sequence[Span]) -> np.ndarray:
        """Mask [S] of the requests that arrive in `spans`."""
        return np.any([(self.arrivals_s >= a) & (self.arrivals_s < b) for a, b in spans], axis=0)


Fold = tuple[list[Span], list[Span]]  # fit, check


def folds(span: Span, how: str, block_s: float, repeats: int = 10, seed: int = 0) -> list[Fold]:
    """Halves of `span`, in blocks of about `block_s`, each once fitted on and once checked.

    `interleaved`: alternating blocks; `shuffled`: `repeats` random halves of the blocks; `first` and `second`: fitted
    on that half in order, checked on the other (one fold each)."""
    start, end = span
    count = max(2, int((end - start) / block_s))
    edges = np.linspace(start, end, count + 1).tolist()
    blocks = list(itertools.pairwise(edges))
    earlier, later = blocks[: count // 2], blocks[count // 2 :]
    if how == "interleaved":
        return [(blocks[::2], blocks[1::2]), (blocks[1::2], blocks[::2])]
    if how == "shuffled":
        random = np.random.default_rng(seed)
        orders = [random.permutation(count) for _ in range(repeats)]
        halves = [([blocks[i] for i in o[: count // 2]], [blocks[i] for i in o[count // 2 :]]) for o in orders]
        return [fold for one, other in halves for fold in ((one, other), (other, one))]
    if how in ("first", "second"):
        return [(earlier, later) if how == "first" else (later, earlier)]
    raise UserError(f"unknown split {how!r}; known: interleaved, shuffled, first, second")


@dataclass(frozen=True, eq=False)
class FittedDemand:
    """The load of the fitted spans: Poisson (`plain`), and with the spread of its rate (`dispersed`)."""

    plain: ModelDemand
    dispersed: ModelDemand
    spread: RateSpread


def fit(trace: TraceDemand, spans: Sequence[Span]) -> FittedDemand:
    """The model's demand as seen in `spans`, and nowhere else: rate, joint samples and spread of the rate."""
    inside, model = trace.inside(spans), trace.model
    if not inside.any():
        raise UserError(f"{model.name}: no request arrives in the fitted part of the trace")
    prompt, output, service = (a[inside] for a in (model.prompt_tokens, model.output_tokens, model.service_s))
    rate = inside.sum() / sum(end - start for start, end in spans)
    shape = (model.num_runs, model.run_token_bytes)
    window_s = _WINDOW_SERVICE_TIMES * float(service.mean())
    spread = rate_spread(trace.arrivals_s[inside], service * (prompt + output / 2), spans, window_s)
    plain = ModelDemand(model.name, float(rate), prompt, output, service, *shape)
    dispersed = ModelDemand(model.name, float(rate), prompt, output, service, *shape, rate_factors=spread.factors)
    return FittedDemand(plain, dispersed, spread)


@dataclass(frozen=True)
class OverflowCheck:
    """Budgets of one kind against what the time they were not fitted on really held.

    `observed` is the overflow over all checked time; `low`, `high` its 95 % block bootstrap (rolling) or the range of
    single folds (splits), which is what one half of one trace may show by chance."""

    how: str
    fit: str
    quantile: float
    budget_pages: int  # mean over folds or blocks
    observed: float
    low: float
    high: float
    plans: int  # budgets that were made

    @property
    def promise(self) -> float:
        return 1 - self.quantile

    @property
    def ratio(self) -> float:
        """Observed over promised overflow; the plan is kept when this is within [1/2, 2]."""
        return self.observed / self.promise

    @property
    def kept(self) -> bool:
        return 0.5 <= self.ratio <= 2.0


def check_split(
    trace: TraceDemand, how: str, block_s: float, quantiles: Sequence[float], page_bytes: int, seed: int
) -> list[OverflowCheck]:
    """Budgets fitted on one part by each of :data:`FITS`, against the overflow of the other part, over
    :func:`folds`."""
    curve, seen = trace.curve(page_bytes), folds(trace.span, how, block_s, seed=seed)
    budgets = np.array([_fold_budgets(trace, curve, fold[0], quantiles, page_bytes, seed) for fold in seen])
    checks = []
    for row, quantile in enumerate(quantiles):
        for column, name in enumerate(FITS):
            budget = budgets[:, row, column]
            observed = [curve.overflow(pages, fold[1]) for pages, fold in zip(budget, seen, strict=True)]
            mean, low, high = float(np.mean(observed)), min(observed), max(observed)
            checks.append(OverflowCheck(how, name, quantile, round(float(budget.mean())), mean, low, high, len(seen)))
    return checks


def _fold_budgets(
    trace: TraceDemand,
    curve: DemandCurve,
    spans: Sequence[Span],
    quantiles: Sequence[float],
    page_bytes: int,
    seed: int,
) -> list[list[int]]:
    """Budgets [quantiles][FITS] from what `spans` show."""
    fitted = fit(trace, spans)
    estimates = [_estimate(model, page_bytes, max(quantiles), seed) for model in (fitted.plain, fitted.dispersed)]
    return [[*(e.pages_at(q) for e in estimates), curve.quantile_pages(q, spans)] for q in quantiles]


def check_rolling(
    trace: TraceDemand, block_s: float, history_s: float, quantiles: Sequence[float], page_bytes: int, seed: int
) -> list[OverflowCheck]:
    """Each block of the trace against a budget planned from the `history_s` before it: what re-planning online
    gives."""
    start, end = trace.span
    curve, edges = trace.curve(page_bytes), np.arange(start + history_s, end - block_s / 2, block_s)
    if not edges.size:
        raise UserError(f"{trace.model.name}: the trace is shorter than a history of {history_s:.0f} s and one block")
    overflow = np.zeros((len(quantiles), edges.size))
    budgets = np.zeros((len(quantiles), edges.size))
    for column, edge in enumerate(edges):
        fitted = fit(trace, [(edge - history_s, edge)])
        estimate = _estimate(fitted.dispersed, page_bytes, max(quantiles), seed)
        for row, quantile in enumerate(quantiles):
            budgets[row, column] = estimate.pages_at(quantile)
            overflow[row, column] = curve.overflow(budgets[row, column], [(edge, min(edge + block_s, end))])
    weights = np.minimum(edges + block_s, end) - edges
    checks = []
    for row, quantile in enumerate(quantiles):
        low, high = block_bootstrap_interval(overflow[row], weights)
        observed = float(np.average(overflow[row], weights=weights))
        mean_budget = round(float(budgets[row].mean()))
        checks.append(OverflowCheck("rolling", "dispersed", quantile, mean_budget, observed, low, high, edges.size))
    return checks


def _estimate(model: ModelDemand, page_bytes: int, quantile: float, seed: int) -> BudgetEstimate:
    return kv_budget_pages([model], page_bytes, quantile, seed)
