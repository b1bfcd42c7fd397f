"""One plan from one configuration: demand, budget, parallelism, layout, and the check on a trace where there is one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from crosspool.planner.closed_form import Moments, page_moments
from crosspool.planner.config import LengthsConfig, ModelConfig, PlannerConfig
from crosspool.planner.demand import BudgetEstimate, ModelDemand, kv_budget_pages
from crosspool.planner.from_trace import OverflowCheck, TraceDemand, check_rolling, check_split, fit
from crosspool.planner.layout import LayoutOptions, PoolDevice, PoolPlan, lay_out
from crosspool.planner.models import model_bytes, model_demand
from crosspool.planner.parallelism import ParallelPlan, best_plan, kv_heads
from crosspool.planner.traces import LengthTrace, find_trace, read_trace
from serving.errors import UserError
from serving.spec import ModelSpec, load_spec, spec_from_config

_SPLITS = ("shuffled", "interleaved", "first", "second")


@dataclass(frozen=True, eq=False)
class PlannedModel:
    """A model of the plan: shape, load, the trace behind it (None without arrivals), and the index of dispersion of its
    work (1 for Poisson)."""

    config: ModelConfig
    spec: ModelSpec
    demand: ModelDemand
    trace: TraceDemand | None
    dispersion: float


@dataclass(frozen=True, eq=False)
class Plan:
    """What the command prints and draws. `monolithic`: each model's plan when all devices serve it, for comparison."""

    config: PlannerConfig
    models: tuple[PlannedModel, ...]
    estimate: BudgetEstimate
    moments: Moments
    monolithic: dict[str, ParallelPlan]
    layout: PoolPlan
    checks: tuple[OverflowCheck, ...]


def make_plan(config: PlannerConfig) -> Plan:
    """Plan for `config`. What does not fit stands in `layout.shortfalls`. Raises UserError for a config that makes no
    plan."""
    specs = [_spec(model) for model in config.models]
    lengths = [_lengths(model.lengths, config.seed, index) for index, model in enumerate(config.models)]
    wanted = config.pools.kv_devices
    candidates = range(1, config.devices.count) if wanted is None else (wanted,)
    if not candidates:
        raise UserError(f"{config.devices.count} devices cannot form two pools; at least two are needed")
    tried = []
    for kv_devices in candidates:
        rows = zip(config.models, specs, lengths, strict=True)
        models = tuple(_planned(*row, kv_devices, config.layers_per_run) for row in rows)
        estimate = _budget(models, config)
        tried.append((models, estimate, _layout(config, models, estimate, kv_devices)))
        if not tried[-1][2].shortfalls:
            break
    models, estimate, layout = min(tried, key=lambda t: sum(s.missing_bytes for s in t[2].shortfalls))
    return Plan(
        config=config,
        models=models,
        estimate=estimate,
        moments=page_moments([m.demand for m in models], config.page_bytes, config.sampling.holding),
        monolithic={m.config.name: best_plan(kv_heads(m.spec), config.devices.count) for m in models},
        layout=layout,
        checks=tuple(_checks(config, models)),
    )


def _spec(model: ModelConfig) -> ModelSpec:
    if model.checkpoint:
        return load_spec(model.checkpoint, model.name)
    try:
        return spec_from_config(dict(model.architecture), model.name)
    except KeyError as error:
        raise UserError(f"{model.name}: architecture lacks the key {error}") from None


def _lengths(config: LengthsConfig, seed: int, index: int) -> LengthTrace:
    if config.trace:
        return read_trace(find_trace(config.trace))
    random = np.random.default_rng([seed, index])
    prompt = _lognormal(random, config.prompt_mean, config.prompt_cv, config)
    return LengthTrace(None, prompt, _lognormal(random, config.output_mean, config.output_cv, config))


def _lognormal(random: np.random.Generator, mean: float, cv: float, config: LengthsConfig) -> np.ndarray:
    sigma = np.log1p(cv**2) ** 0.5
    drawn = random.lognormal(np.log(mean) - sigma**2 / 2, sigma, config.samples)
    return np.clip(np.rint(drawn), 1, config.max_tokens).astype(np.int64)


def _planned(
    config: ModelConfig, spec: ModelSpec, lengths: LengthTrace, kv_devices: int, layers_per_run: int
) -> PlannedModel:
    demand = model_demand(
        spec,
        config.dtype,
        config.rate_rps or 0.0,
        lengths.prompt_tokens,
        lengths.output_tokens,
        config.service,
        kv_devices,
        layers_per_run,
    )
    if lengths.arrivals_s is None:
        if config.rate_rps is None:
            raise UserError(f"{config.name}: rate_rps is missing, and the trace has no arrival times")
        return PlannedModel(config, spec, demand, None, 1.0)
    trace = TraceDemand(lengths.arrivals_s, demand)
    fitted = fit(trace, [trace.span])
    rate = fitted.plain.rate_rps if config.rate_rps is None else config.rate_rps
    return PlannedModel(config, spec, replace(fitted.dispersed, rate_rps=rate), trace, fitted.spread.index)


def _budget(models: Sequence[PlannedModel], config: PlannerConfig) -> BudgetEstimate:
    demands = [model.demand for model in models]
    return kv_budget_pages(demands, config.page_bytes, config.quantiles[-1], config.seed, config.sampling)


def _layout(
    config: PlannerConfig, models: Sequence[PlannedModel], estimate: BudgetEstimate, kv_devices: int
) -> PoolPlan:
    devices = [
        PoolDevice(f"{config.devices.name}{i}", config.devices.memory_bytes) for i in range(config.devices.count)
    ]
    pools = config.pools
    options = LayoutOptions(kv_devices, pools.ffn_split, pools.kv_workspace_bytes, pools.weights_workspace_bytes)
    asked = [model_bytes(m.spec, m.config.dtype, _request_bytes(m, config.page_bytes)) for m in models]
    return lay_out(devices, asked, estimate.budget_bytes, config.page_bytes, options)


def _request_bytes(model: PlannedModel, page_bytes: int) -> int:
    return int(model.demand.pages(np.int64(model.config.request_tokens), page_bytes)) * page_bytes


def _checks(config: PlannerConfig, models: Sequence[PlannedModel]) -> list[OverflowCheck]:
    if config.check is None:
        return []
    trace = next(model.trace for model in models if model.config.name == config.check.model)
    if trace is None:
        raise UserError(f"check.model {config.check.model!r} has no trace with arrival times to check on")
    block_s, arguments = config.check.block_s, (config.quantiles, config.page_bytes, config.seed)
    checks = [check for how in _SPLITS for check in check_split(trace, how, block_s, *arguments)]
    return checks + check_rolling(trace, block_s, config.check.history_s, *arguments)
