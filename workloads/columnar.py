"""A trace in columns: a million requests are a few arrays, and become objects one at a time, when they are read."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from workloads.prompts import PromptPlan, Ragged, make_prompts
from workloads.trace import TraceRequest


@dataclass(frozen=True)
class ModelLimits:
    """What a trace must respect of a model. `tokenizer` (a directory or a name on the hub) turns text into its tokens."""

    name: str
    vocab_size: int
    max_context_tokens: int
    tokenizer: str = ""


@dataclass(frozen=True, eq=False)
class Trace:
    """Requests in columns [S], in order of arrival.

    `made` is what was decided on the way and belongs in a record: how models were assigned, expected shares and rate, what
    was clipped or cut. It is kept in a trace file and is no part of the digest.
    """

    models: tuple[ModelLimits, ...]
    duration_s: float
    arrival_s: np.ndarray  # float64
    model: np.ndarray  # int32, index into models
    prompt_tokens: np.ndarray  # int32
    output_tokens: np.ndarray  # int32
    prompts: PromptPlan
    hashes: Ragged | None = None  # prefix block hashes of each request, where the source has them
    prompt_ids: Ragged | None = None  # token ids of each request, where prompts are text
    prompt_keys: np.ndarray | None = None  # int64, what each prompt is drawn by; None: its number
    made: Mapping[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.arrival_s)

    def __iter__(self) -> Iterator[TraceRequest]:
        names = [limits.name for limits in self.models]
        vocabularies = [limits.vocab_size for limits in self.models]
        prompts = make_prompts(
            self.prompts, vocabularies, self.model, self.prompt_tokens, self.hashes, self.prompt_ids, self.prompt_keys
        )
        for index, prompt in enumerate(prompts):
            yield TraceRequest(
                index,
                names[self.model[index]],
                float(self.arrival_s[index]),
                int(self.prompt_tokens[index]),
                int(self.output_tokens[index]),
                prompt,
            )

    @property
    def digest(self) -> str:
        """SHA-256 over the columns, what prompts are made from, the duration and the models: equal traces have equal
        digests, and a system is given the same trace if and only if its digest is the same."""
        state = hashlib.sha256()
        for name, kind in COLUMN_TYPES.items():
            state.update(np.ascontiguousarray(getattr(self, name), dtype=kind).tobytes())
        for ragged in (self.hashes, self.prompt_ids):
            if ragged is not None:
                state.update(ragged.offsets.tobytes() + ragged.values.tobytes())
        if self.prompt_keys is not None:
            state.update(np.ascontiguousarray(self.prompt_keys, dtype="<i8").tobytes())
        # where a tokenizer lies on one machine is no part of the trace: the ids it gave are
        models = [(limits.name, limits.vocab_size, limits.max_context_tokens) for limits in self.models]
        state.update(json.dumps([self.duration_s, asdict(self.prompts), models]).encode())
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
            **self.made,
        }


COLUMN_TYPES = {
    "arrival_s": np.dtype("<f8"),
    "model": np.dtype("<i4"),
    "prompt_tokens": np.dtype("<i4"),
    "output_tokens": np.dtype("<i4"),
}
