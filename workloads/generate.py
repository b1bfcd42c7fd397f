"""From a description to a trace, with numpy; requests become objects only when they are asked for, one at a time."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from workloads.config import Lengths, WorkloadConfig
from workloads.trace import TraceRequest


@dataclass(frozen=True)
class ModelLimits:
    """What a trace must respect of a model."""

    name: str
    vocab_size: int
    max_context_tokens: int


class Trace:
    """Requests in columns, in order of arrival. Prompts are drawn when a request is read, from its own seed."""

    def __init__(
        self,
        models: Sequence[ModelLimits],
        duration_s: float,
        arrival_s: np.ndarray,
        model: np.ndarray,
        prompt_tokens: np.ndarray,
        output_tokens: np.ndarray,
        prompt_seed: int,
        clipped: int,
    ) -> None:
        self.models = tuple(models)
        self.duration_s = duration_s
        self.arrival_s, self.model = arrival_s, model
        self.prompt_tokens, self.output_tokens = prompt_tokens, output_tokens
        self.prompt_seed, self.clipped = prompt_seed, clipped

    def __len__(self) -> int:
        return len(self.arrival_s)

    def __iter__(self) -> Iterator[TraceRequest]:
        for index in range(len(self)):
            limits = self.models[self.model[index]]
            count = int(self.prompt_tokens[index])
            rng = np.random.default_rng((self.prompt_seed, index))
            prompt = tuple(rng.integers(0, limits.vocab_size, count).tolist())
            yield TraceRequest(
                index, limits.name, float(self.arrival_s[index]), count, int(self.output_tokens[index]), prompt
            )

    @property
    def digest(self) -> str:
        """SHA-256 over the columns, the prompt seed and the models: equal traces have equal digests."""
        state = hashlib.sha256()
        for column in (self.arrival_s, self.model, self.prompt_tokens, self.output_tokens):
            state.update(np.ascontiguousarray(column).tobytes())
        state.update(repr((self.prompt_seed, self.models)).encode())
        return state.hexdigest()

    def summary(self) -> dict[str, Any]:
        """Plain numbers for the record."""
        counts = np.bincount(self.model, minlength=len(self.models))
        return {
            "requests": len(self),
            "rate_rps": len(self) / self.duration_s,
            "requests_by_model": {m.name: int(c) for m, c in zip(self.models, counts, strict=True)},
            "mean_prompt_tokens": float(self.prompt_tokens.mean()) if len(self) else None,
            "mean_output_tokens": float(self.output_tokens.mean()) if len(self) else None,
            "clipped": self.clipped,
        }


def build_trace(config: WorkloadConfig, models: Sequence[ModelLimits]) -> Trace:
    """The trace of `config` over `models`, in order of popularity. Lengths beyond a model's context are clipped, counted."""
    shares = np.arange(1, len(models) + 1, dtype=np.float64) ** -config.popularity.alpha
    shares /= shares.sum()
    rate_rps = config.arrivals.rate_rps * (len(models) if config.arrivals.rate_of == "model" else 1)
    arrival_s = _poisson(rate_rps, config.duration_s, np.random.default_rng(config.seeds.schedule))
    count = len(arrival_s)
    model = np.random.default_rng((1, config.seeds.model)).choice(len(models), size=count, p=shares)
    prompt, output = _lengths(config.lengths, count, np.random.default_rng((2, config.seeds.lengths)))
    context = np.array([m.max_context_tokens for m in models])[model]
    wanted = prompt + output
    output = np.minimum(output, np.maximum(context - 1, 1))
    prompt = np.minimum(prompt, context - output)
    clipped = int((prompt + output < wanted).sum())
    return Trace(models, config.duration_s, arrival_s, model, prompt, output, config.seeds.prompts, clipped)


def _poisson(rate_rps: float, duration_s: float, rng: np.random.Generator) -> np.ndarray:
    """Arrival times in [0, duration): exponential gaps, never truncated, drawn until the duration is passed."""
    chunks, last = [], 0.0
    while last < duration_s:
        size = max(16, int(1.1 * rate_rps * (duration_s - last)) + 1)
        chunks.append(last + rng.exponential(1.0 / rate_rps, size).cumsum())
        last = chunks[-1][-1]
    times = np.concatenate(chunks)
    return times[times < duration_s]


def _lengths(lengths: Lengths, count: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    if lengths.kind == "fixed":
        return np.full(count, lengths.prompt_max), np.full(count, lengths.output_max)
    prompt = rng.integers(lengths.prompt_min, lengths.prompt_max, count, endpoint=True)
    return prompt, rng.integers(lengths.output_min, lengths.output_max, count, endpoint=True)
