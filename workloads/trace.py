"""A trace: the requests that every system is given, in the order of their planned arrival.

This is the one type that workload generators produce and the runner replays. A trace is plain data: the same trace
replays against every system, and its digest stands in every record.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class TraceRequest:
    """One request. `prompt` holds token ids; a trace of lengths only (paper scale, simulated) leaves it empty."""

    request_id: int
    model: str
    arrival_s: float  # planned, from the start of the trace
    prompt_tokens: int
    output_tokens: int  # the number of tokens that generation is asked for
    prompt: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.prompt and len(self.prompt) != self.prompt_tokens:
            raise ValueError(
                f"request {self.request_id}: {len(self.prompt)} ids for {self.prompt_tokens} prompt tokens"
            )
