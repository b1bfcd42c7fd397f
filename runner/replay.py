"""Open-loop replay: requests go in when the trace says, whether or not the system keeps up, and every one ends once."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Iterator

from tqdm import tqdm

from runner.observation import COMPLETED, FAILED, REJECTED, Observation, PoolRow, RequestRow
from serving.backend import Clock, MonotonicClock
from serving.errors import WorkerDied, one_line
from serving.interface import Event, EventKind, PoolSample, Request, System
from workloads.trace import TraceRequest

_OUTCOMES = {EventKind.COMPLETED: COMPLETED, EventKind.REJECTED: REJECTED, EventKind.FAILED: FAILED}
_SHORTEST_SLEEP_S = 1e-6  # a virtual clock must move on, however near the next arrival is
INTERRUPTED = "interrupted"
UNFINISHED = "unfinished when the drain timeout ended"


class Replay:
    """One replay of `trace` against a started `system`. After the last arrival it drains for `drain_timeout_s` at most.
    `clock` is the backend's: virtual time passes only where this loop sleeps. With `lengths_only`, requests whose trace has
    no prompts come with prompts of their length: right for a backend that reads no token."""

    def __init__(
        self,
        system: System,
        trace: Iterable[TraceRequest],
        drain_timeout_s: float,
        poll_interval_s: float,
        clock: Clock | None = None,
        lengths_only: bool = False,
    ) -> None:
        self._clock = clock or MonotonicClock()
        self._lengths_only = lengths_only
        self._system = system
        self._trace = trace
        self._drain_timeout_s = drain_timeout_s
        self._poll_interval_s = poll_interval_s
        self._rows: dict[int, RequestRow] = {}
        self._pages: dict[str, dict[str, int]] = {}  # in use at the last sample, by pool and model
        self._open = 0
        self._origin_ns = 0
        self._bar: tqdm | None = None

    def run(self, total: int, label: str) -> Observation:
        """Replay to the end, to the timeout, to an interrupt or to a worker's death; what was seen is always returned."""
        observation = Observation(requests=[])
        self._origin_ns = self._clock.now_ns()
        with tqdm(total=total, desc=label, unit="req", disable=not sys.stderr.isatty()) as self._bar:
            try:
                self._feed_and_drain(observation)
            except WorkerDied as error:
                observation.interrupted = one_line(error)
            except KeyboardInterrupt:
                observation.interrupted = INTERRUPTED
        observation.duration_ns = self._clock.now_ns() - self._origin_ns
        observation.requests = list(self._rows.values())
        self._close_open_requests(observation.interrupted or UNFINISHED)
        observation.devices = self._system.stats()
        return observation

    def _feed_and_drain(self, observation: Observation) -> None:
        arrivals: Iterator[TraceRequest] = iter(self._trace)
        upcoming = next(arrivals, None)
        deadline_s: float | None = None
        while True:
            now_s = (self._clock.now_ns() - self._origin_ns) / 1e9
            while upcoming is not None and upcoming.arrival_s <= now_s:
                self._submit(upcoming)
                upcoming = next(arrivals, None)
            self._collect(observation)
            if upcoming is None:
                if not self._open:
                    return
                deadline_s = deadline_s or now_s + self._drain_timeout_s
                if now_s > deadline_s:
                    return
            until_arrival_s = math.inf if upcoming is None else max(upcoming.arrival_s - now_s, _SHORTEST_SLEEP_S)
            self._clock.wait(until_arrival_s, self._poll_interval_s)

    def _submit(self, planned: TraceRequest) -> None:
        row = RequestRow(
            request_id=planned.request_id,
            model=planned.model,
            prompt_tokens=planned.prompt_tokens,
            output_tokens=planned.output_tokens,
            planned_ns=round(planned.arrival_s * 1e9),
            submitted_ns=self._clock.now_ns() - self._origin_ns,
        )
        self._rows[planned.request_id] = row
        self._open += 1
        prompt = planned.prompt
        if not prompt and self._lengths_only:
            prompt = (0,) * planned.prompt_tokens
        self._system.submit(Request(planned.request_id, planned.model, prompt, planned.output_tokens))

    def _collect(self, observation: Observation) -> None:
        for event in self._system.poll():
            self._take(event)
        for sample in self._system.pool_samples():
            observation.pools.extend(self._changed(sample))

    def _changed(self, sample: PoolSample) -> list[PoolRow]:
        """Rows of the models whose pages are not what they were: a pool of many models would else fill the memory with
        repetitions. Never empty, so that the time of the sample is kept."""
        known = self._pages.setdefault(sample.device, {})
        changed = [model for model, pages in sample.pages_in_use.items() if known.get(model) != pages]
        known.update(sample.pages_in_use)
        time_ns = sample.time_ns - self._origin_ns
        return [
            PoolRow(time_ns, sample.device, model, known[model], sample.page_budget, sample.page_bytes)
            for model in changed or list(sample.pages_in_use)[:1]
        ]

    def _take(self, event: Event) -> None:
        row = self._rows[event.request_id]
        if row.outcome:
            raise RuntimeError(f"request {event.request_id} ended as {row.outcome} and then had {event.kind.value}")
        time_ns = event.time_ns - self._origin_ns
        if event.kind is EventKind.TOKENS:
            row.token_times_ns += [time_ns] * len(event.tokens)
            row.token_ids += event.tokens
        elif event.kind is EventKind.ADMITTED:
            row.admitted_ns = time_ns
        elif event.kind is EventKind.PREEMPTED:
            row.preemptions += 1
        else:
            if event.kind is EventKind.COMPLETED and len(row.token_ids) != row.output_tokens:
                raise RuntimeError(
                    f"request {event.request_id} completed with {len(row.token_ids)} tokens, {row.output_tokens} were asked for"
                )
            row.outcome, row.reason, row.ended_ns = _OUTCOMES[event.kind], event.reason, time_ns
            self._open -= 1
            if self._bar is not None:
                self._bar.update()

    def _close_open_requests(self, reason: str) -> None:
        for row in self._rows.values():
            if not row.outcome:
                row.outcome, row.reason = FAILED, reason
