"""What was seen of each request and of the pools while a trace was replayed: plain rows, from which metrics are computed.

Times are nanoseconds from the start of the replay, the clock of planned arrivals.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import pyarrow as pa

from serving.interface import DeviceStats

COMPLETED, REJECTED, FAILED = "completed", "rejected", "failed"


@dataclass(slots=True)
class RequestRow:
    """One request of the trace. `token_times_ns[i]` is when token i reached the host's clock; `planned_ns` when the trace
    wanted the request, `submitted_ns` when it was handed over."""

    request_id: int
    model: str
    prompt_tokens: int
    output_tokens: int
    planned_ns: int
    submitted_ns: int | None = None
    admitted_ns: int | None = None
    token_times_ns: list[int] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    ended_ns: int | None = None
    outcome: str = ""
    reason: str = ""
    preemptions: int = 0


@dataclass(frozen=True, slots=True)
class PoolRow:
    """Pages in use of one model in one pool at one time."""

    time_ns: int
    pool: str
    model: str
    pages_in_use: int
    page_budget: int
    page_bytes: int


@dataclass
class Observation:
    """Everything a replay leaves behind. `interrupted` says why it ended early, or is empty; `other_cpu_share` is the share
    of the devices' cores that other programs took meanwhile, None where nothing computed here."""

    requests: list[RequestRow]
    pools: list[PoolRow] = field(default_factory=list)
    devices: list[DeviceStats] = field(default_factory=list)
    duration_ns: int = 0
    interrupted: str = ""
    other_cpu_share: float | None = None
    timeline: pa.Table | None = None  # where the run was asked for one
