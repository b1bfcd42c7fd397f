"""Continuous batching: what one step of one model computes, and which model steps next. Pure policies.

A sequence is *pending* by the tokens it has that are not yet in its KV cache: its prompt at first, one token afterwards.
Decode and prefill share a step: every sequence with one pending token takes a row, and what is left of the row budget goes
to prefill chunks in order of arrival (Sarathi-Serve's stall-free batching).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from serving.errors import UserError


@dataclass(frozen=True)
class StepLimits:
    """Of one step: at most `max_batch` sequences, and `prefill_chunk` rows of prompt beside the decode rows. Of one model: at
    most `lanes_of_model` steps under way at once; 0: as many as there are lanes."""

    max_batch: int = 8
    prefill_chunk: int = 128
    lanes_of_model: int = 0

    def __post_init__(self) -> None:
        if self.max_batch < 1 or self.prefill_chunk < 1:
            raise UserError(f"max_batch {self.max_batch} and prefill_chunk {self.prefill_chunk} must be at least 1")
        if not isinstance(self.lanes_of_model, int) or self.lanes_of_model < 0:
            raise UserError(
                f"option lanes_of_model is {self.lanes_of_model!r}; it must be a whole number, 0 for all lanes"
            )

    @property
    def max_rows(self) -> int:
        """The most rows that a step can have."""
        return self.max_batch + self.prefill_chunk


def compose_step(pending: Sequence[int], limits: StepLimits) -> list[tuple[int, int]]:
    """Of sequences with `pending` tokens each, oldest first: (index, rows) of those that step now, decode rows first."""
    chosen = [(index, 1) for index, tokens in enumerate(pending) if tokens == 1][: limits.max_batch]
    prompt_rows = limits.prefill_chunk
    for index, tokens in enumerate(pending):
        if prompt_rows == 0 or len(chosen) == limits.max_batch:
            break
        if tokens > 1:
            rows = min(tokens, prompt_rows)
            chosen.append((index, rows))
            prompt_rows -= rows
    return chosen


def least_recently_served(ready: Sequence[int], served_at: Mapping[int, int]) -> int:
    """The model among `ready` whose last step lies longest back (never served first, ties to the lower number).

    Starvation-free: a ready model waits for at most one step of every other.
    """
    never = [model for model in ready if model not in served_at]
    return min(never) if never else min(ready, key=served_at.__getitem__)  # no two were served by the same step
