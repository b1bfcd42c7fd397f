"""From a description to a trace, with numpy: schedule, models, lengths and prompts, each from its own seed."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from workloads.arrivals import arrival_times, replay_times
from workloads.columnar import ModelLimits, Trace
from workloads.config import Injection, WorkloadConfig
from workloads.errors import WorkloadError
from workloads.expected import expected
from workloads.files import trace_for
from workloads.lengths import Drawn, draw_lengths, resample, scaled
from workloads.popularity import assign, model_shares, total_rate
from workloads.prompts import INJECTED_KEYS, PromptPlan, Ragged
from workloads.seeds import INJECTED, LENGTHS, MODEL, SCHEDULE, SHARES, stream
from workloads.sources import SourceRows, load_source

__all__ = ["ModelLimits", "Trace", "build_trace"]


def build_trace(config: WorkloadConfig, models: Sequence[ModelLimits]) -> Trace:
    """The trace of `config` over `models`, in order of popularity. Lengths beyond a model's context are clipped, counted.
    Raises WorkloadError."""
    _check_models(models)
    if config.trace_file:
        return trace_for(Path(config.trace_file), models)
    names = [limits.name for limits in models]
    source = load_source(config.source) if _reads_source(config) else None
    shares = model_shares(config.popularity, names, stream(config.seeds.model, SHARES))
    # what `power_law_top` fixes is one model's rate already
    per_model = config.arrivals.rate_of == "model" and config.popularity.kind != "power_law_top"
    rate_rps = total_rate(config.popularity, config.arrivals.rate_rps * (len(models) if per_model else 1), shares)
    arrival_s, model = _schedule(config, rate_rps, shares, source)
    duration_s = _duration(config, source)
    drawn = _lengths(config, len(arrival_s), source, models, model)
    made: dict[str, Any] = {
        "assignment": _assignment(config, source),
        "expected": expected(config, rate_rps, shares, source),
        "expected_shares": {name: float(share) for name, share in zip(names, shares, strict=True)},
        "cut_share": drawn.cut_share,
        "injected": config.injection.requests,
        "source": source.identity if source else None,
    }
    arrival_s, model, drawn, keys = _inject(config, arrival_s, model, drawn, shares, names)
    context = np.array([limits.max_context_tokens for limits in models])[model]
    prompt, output = _clipped(drawn.prompt, drawn.output, context)
    made["clipped"] = int(((prompt < drawn.prompt) | (output < drawn.output)).sum())
    made["clipped_tokens"] = int(
        (drawn.prompt - prompt).sum(dtype=np.int64) + (drawn.output - output).sum(dtype=np.int64)
    )
    prompts = config.prompts
    plan = PromptPlan(prompts.kind, config.seeds.prompts)
    if prompts.kind == "prefix":
        parts = {key: getattr(prompts, key) for key in ("prefix_tokens", "prefix_share", "prefix_groups")}
        plan = dataclasses.replace(plan, **parts)
    hashes, ids = _carried(config, source, drawn.rows, models, model, prompt)
    return Trace(tuple(models), duration_s, arrival_s, model, prompt, output, plan, hashes, ids, keys, made)


def _check_models(models: Sequence[ModelLimits]) -> None:
    if not models:
        raise WorkloadError("workload: no model is given; a trace needs one at least")
    for limits in models:
        if limits.max_context_tokens < 2 or limits.vocab_size < 1:
            raise WorkloadError(
                f"model {limits.name}: a context of {limits.max_context_tokens} tokens and a vocabulary of "
                f"{limits.vocab_size} hold no request"
            )


def _reads_source(config: WorkloadConfig) -> bool:
    return config.arrivals.kind == "replay" or config.lengths.kind in ("empirical", "replay")


def _assignment(config: WorkloadConfig, source: SourceRows | None) -> str:
    how = f"models assigned by popularity ({config.popularity.kind}), independently of time and length"
    return f"{how}; {source.identity['file']} is a trace of one service" if source else how


def _schedule(
    config: WorkloadConfig, rate_rps: float, shares: np.ndarray, source: SourceRows | None
) -> tuple[np.ndarray, np.ndarray]:
    """Arrival times and model indices, in order of arrival."""
    arrivals, seeds = config.arrivals, config.seeds
    if arrivals.process_of == "model":
        times = [
            arrival_times(arrivals, rate_rps * share, config.duration_s, stream(seeds.schedule, SCHEDULE, 1 + number))
            if share > 0
            else np.empty(0)
            for number, share in enumerate(shares)
        ]
        model = np.repeat(np.arange(len(shares), dtype=np.int32), [len(part) for part in times])
        arrival_s = np.concatenate(times)
        order = np.argsort(arrival_s, kind="stable")
        return arrival_s[order], model[order]
    if arrivals.kind == "replay":
        arrival_s = replay_times(source.arrival_s, arrivals.rate_scale, config.duration_s)
    else:
        arrival_s = arrival_times(arrivals, rate_rps, config.duration_s, stream(seeds.schedule, SCHEDULE))
    return arrival_s, assign(shares, len(arrival_s), stream(seeds.model, MODEL))


def _duration(config: WorkloadConfig, source: SourceRows | None) -> float:
    """A replayed trace ends with its file: the time after that offers nothing, and would lower every rate."""
    if config.arrivals.kind != "replay":
        return config.duration_s
    end_s = float(source.arrival_s[-1] - source.arrival_s[0]) / config.arrivals.rate_scale
    end_s = max(end_s, config.injection.at_s + config.injection.over_s if config.injection.requests else 0.0)
    return min(config.duration_s, math.nextafter(end_s, math.inf))


def _lengths(
    config: WorkloadConfig,
    count: int,
    source: SourceRows | None,
    models: Sequence[ModelLimits],
    model: np.ndarray,
) -> Drawn:
    lengths = config.lengths
    rng = stream(config.seeds.lengths, LENGTHS)
    if lengths.kind == "replay":
        rows = np.arange(count)
        prompt, output = source.prompt_tokens[rows], source.output_tokens[rows]
        return Drawn(scaled(prompt, lengths.scale), scaled(output, lengths.scale), {}, rows)
    if lengths.kind == "empirical":
        if source.texts is not None:
            return source.texts.resample(lengths, models, model, rng)
        return resample(lengths, source.prompt_tokens, source.output_tokens, rng.random(count))
    return draw_lengths(lengths, count, rng)


def _inject(
    config: WorkloadConfig,
    arrival_s: np.ndarray,
    model: np.ndarray,
    drawn: Drawn,
    shares: np.ndarray,
    names: Sequence[str],
) -> tuple[np.ndarray, np.ndarray, Drawn, np.ndarray | None]:
    """The trace with the burst of long requests merged in; the requests around it stay what they were, their prompts too:
    the last part is what each prompt is drawn by, None where that is its number."""
    burst: Injection = config.injection
    if not burst.requests:
        return arrival_s, model, drawn, None
    if config.prompts.kind in ("text", "blocks"):
        raise WorkloadError(f"workload.injection has no prompts of kind {config.prompts.kind!r}: use random or prefix")
    if burst.model and burst.model not in names:
        raise WorkloadError(f"workload.injection.model: unknown model {burst.model!r}; known: {', '.join(names)}")
    rng = stream(config.seeds.schedule, INJECTED)
    times = burst.at_s + burst.over_s * np.sort(rng.random(burst.requests))
    if burst.model:
        asked = np.full(burst.requests, names.index(burst.model), dtype=np.int32)
    else:
        asked = assign(shares, burst.requests, stream(config.seeds.model, INJECTED))
    merged = np.concatenate((arrival_s, times))
    order = np.argsort(merged, kind="stable")
    prompt = np.concatenate((drawn.prompt, np.full(burst.requests, burst.prompt_tokens, dtype=np.int32)))
    output = np.concatenate((drawn.output, np.full(burst.requests, burst.output_tokens, dtype=np.int32)))
    lengths = Drawn(prompt[order], output[order], drawn.cut_share)
    keys = np.concatenate((np.arange(len(arrival_s)), INJECTED_KEYS + np.arange(burst.requests)))
    return merged[order], np.concatenate((model, asked))[order], lengths, keys[order]


def _clipped(prompt: np.ndarray, output: np.ndarray, context: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Lengths that fit a context: the output keeps what it wants (of all but one token), the prompt gets the rest."""
    fitting = np.minimum(output, context - 1)
    return np.minimum(prompt, context - fitting).astype(np.int32), fitting.astype(np.int32)


def _carried(
    config: WorkloadConfig,
    source: SourceRows | None,
    rows: np.ndarray | None,
    models: Sequence[ModelLimits],
    model: np.ndarray,
    prompt: np.ndarray,
) -> tuple[Ragged | None, Ragged | None]:
    """What the source knows beyond lengths: prefix hashes of replayed rows, token ids of text."""
    if config.prompts.kind == "text":
        return None, source.texts.prompt_ids(rows, models, model, prompt)
    if source is not None and source.hashes is not None and rows is not None and not config.injection.requests:
        return source.hashes.take(rows), None
    return None, None
