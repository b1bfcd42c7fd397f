"""`python -m runner.soak`: thousands of short requests through each system, and whether they leave anything behind.

    python -m runner.soak                                        every system, 10,000 requests each
    python -m runner.soak --systems crosspool static --requests 2000
    python -m runner.soak --ship                                 what was judged, without its series, into results/soak.json
    python -m runner.soak --show                                 the table of those that are shipped

Tiny models (conf=soak) whose KV is scarce; so many requests in flight that the engines never idle; every 50th asks for more
than its model's context, every 20th is cancelled, half of those at once and half after a token. While it runs, memory,
descriptors, threads and KV pages are sampled; at its end it is judged: flat, all given back, every request accounted for.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tqdm import tqdm

from runner import locks, machine
from runner.config import BenchConfig
from runner.footprint import Footprint, held_shared_memory, left_in_shared_memory, shared_memory_names
from runner.presets import CONFIGURATION, composed
from runner.provenance import provenance
from runner.records import require_writable
from runner.run import cluster_of, demand_of, served_models
from runner.short import is_short
from runner.soak_judges import Judgement, Left, judge
from runner.soak_records import SCHEMA_VERSION, ship, shipped, table, write
from serving import registry
from serving.backend import RealBackend
from serving.errors import UserError, WorkerDied, command, one_line
from serving.interface import Event, EventKind, Request, ServedModel, System
from workloads.config import workload_from_dict
from workloads.generate import ModelLimits, build_trace
from workloads.trace import TraceRequest

_REPOSITORY = Path(__file__).resolve().parents[1]
OUT, SHIPPED = _REPOSITORY / "results" / "local" / "soak", _REPOSITORY / "results" / "soak.json"
_TOO_LONG_EVERY, _CANCELLED_EVERY = 50, 20
_CANCELLED_OUTPUT = 24  # tokens that a request asks for which is cancelled after one
_MOST_SAMPLES = 400
_STUCK_S = 120.0
_SETTLE_S = 5.0  # for the last reports of pages
SENT, TOO_LONG, ASKED_TO_CANCEL = "sent", "too_long", "asked_to_cancel"


@dataclass
class Seen:
    """What came of the requests, and samples over time as equally long lists."""

    counts: Counter[str] = field(default_factory=Counter)
    series: dict[str, list[float]] = field(default_factory=dict)
    pages: dict[str, int] = field(default_factory=dict)  # in use as last reported, by pool and models
    shared_memory: set[str] = field(default_factory=set)  # names in /dev/shm that were held
    wrong: str = ""  # why it ended early, or what no system may do

    def sample(self, ended: int, elapsed_s: float) -> None:
        values = {"time_s": round(elapsed_s, 3), "ended": ended, **asdict(Footprint.now())}
        values["kv_pages"] = sum(self.pages.values())
        self.shared_memory |= held_shared_memory()
        for name, value in values.items():
            self.series.setdefault(name, []).append(value)


class Soak:
    """Keeps `in_flight` requests of `trace`, taken round and round, with `system` until `total` have ended."""

    def __init__(
        self,
        system: System,
        models: Sequence[ServedModel],
        trace: Sequence[TraceRequest],
        total: int,
        in_flight: int,
        poll_interval_s: float,
    ) -> None:
        self._system, self._trace, self._total, self._most = system, trace, total, in_flight
        self._contexts = {model.name: model.spec.max_context_tokens for model in models}
        self._poll_interval_s = poll_interval_s
        self._open: dict[int, int] = {}  # tokens still to come, by request
        self._to_cancel: set[int] = set()
        self._ended = 0
        self._seen = Seen()

    def run(self, label: str) -> Seen:
        """To the end, or to where no request ends any more or a worker dies, which `wrong` tells."""
        seen, every = self._seen, max(1, self._total // _MOST_SAMPLES)
        started_s = progress_s = time.monotonic()
        sampled = 0
        with tqdm(total=self._total, desc=label, unit="req", disable=not sys.stderr.isatty()) as bar:
            try:
                while self._ended < self._total and not seen.wrong:
                    self._feed()
                    before = self._ended
                    self._collect()
                    if self._ended > before:
                        bar.update(self._ended - before)
                        progress_s = time.monotonic()
                    if self._ended >= sampled + every:
                        sampled = self._ended
                        seen.sample(self._ended, time.monotonic() - started_s)
                    if time.monotonic() > progress_s + _STUCK_S:
                        seen.wrong = f"no request ended for {_STUCK_S:g} s with {len(self._open)} in flight"
                self._settle()
            except WorkerDied as error:
                seen.wrong = one_line(error)
        return seen

    def _feed(self) -> None:
        while len(self._open) < self._most and self._seen.counts[SENT] < self._total:
            number = self._seen.counts[SENT]
            planned = self._trace[number % len(self._trace)]
            output = planned.output_tokens
            if number % _TOO_LONG_EVERY == 1:
                output = self._contexts[planned.model]
                self._seen.counts[TOO_LONG] += 1
            elif number % _CANCELLED_EVERY in (2, 12):
                output = _CANCELLED_OUTPUT
            self._open[number] = output
            self._seen.counts[SENT] += 1
            self._system.submit(Request(number, planned.model, planned.prompt, output))
            if number % (2 * _CANCELLED_EVERY) == 2:
                self._cancel(number)
            elif number % (2 * _CANCELLED_EVERY) == 22:
                self._to_cancel.add(number)

    def _cancel(self, number: int) -> None:
        self._seen.counts[ASKED_TO_CANCEL] += self._system.cancel(number)

    def _collect(self) -> None:
        events = self._system.poll()
        for event in events:
            self._take(event)
        for sample in self._system.pool_samples():
            for model, pages in sample.pages_in_use.items():
                self._seen.pages[f"{sample.device} {model}"] = pages
        if not events:
            time.sleep(self._poll_interval_s)

    def _take(self, event: Event) -> None:
        number = event.request_id
        if number not in self._open:
            self._seen.wrong = f"request {number} had {event.kind.value} and is not in flight"
            return
        self._open[number] -= len(event.tokens)
        if event.kind is EventKind.PREEMPTED:
            self._seen.counts["preempted"] += 1
        elif event.kind is EventKind.TOKENS and number in self._to_cancel:
            self._to_cancel.discard(number)
            self._cancel(number)
        elif event.kind.terminal:
            left = self._open.pop(number)
            self._to_cancel.discard(number)
            self._seen.counts[event.kind.value] += 1
            self._ended += 1
            if event.kind is EventKind.COMPLETED and left:
                self._seen.wrong = f"request {number} completed with {left} tokens missing"

    def _settle(self) -> None:
        """The last samples of pages follow the last tokens."""
        until_s = time.monotonic() + _SETTLE_S
        while any(self._seen.pages.values()) and time.monotonic() < until_s:
            self._collect()


def soak(system_name: str, total: int, in_flight: int) -> dict[str, Any]:
    """The record of one system's soak, judged. Raises UserError where the system cannot serve the models at all."""
    config = configuration(system_name)
    models = served_models(config)
    limits = [ModelLimits(m.name, m.spec.vocab_size, m.spec.max_context_tokens) for m in models]
    trace = build_trace(workload_from_dict(config.workload), limits)
    started_at, shm_before = datetime.now(UTC).isoformat(), shared_memory_names()
    system = registry.create(config.system.name, config.system.options)
    placement = system.plan(cluster_of(config), models, demand_of(trace, trace.duration_s))
    before = Footprint.now()
    with locks.computing(machine.cores_of(config.devices)):
        begun_s = time.monotonic()
        try:
            system.start(placement, RealBackend())
            seen = Soak(system, models, list(trace), total, in_flight, config.poll_interval_ms / 1e3).run(system_name)
        finally:
            system.stop()
        took_s = time.monotonic() - begun_s
    after = Footprint.now()
    left = Left(
        left_in_shared_memory(shm_before, seen.shared_memory),
        after.processes - before.processes,
        after.descriptors - before.descriptors,
    )
    judgements = judge(seen.counts, seen.series, seen.pages, left, seen.wrong)
    return {
        "schema_version": SCHEMA_VERSION,
        "system": system_name,
        "command": f"python -m runner.soak --systems {system_name} --requests {total} --in-flight {in_flight}",
        "started_at": started_at,
        "took_s": round(took_s, 1),
        "config": asdict(config),
        "provenance": provenance(),
        "counts": dict(seen.counts),
        "judgements": [asdict(judgement) for judgement in judgements],
        "passed": all(judgement.passed for judgement in judgements),
        "series": seen.series,
    }


def configuration(system_name: str) -> BenchConfig:
    """What `bench.py conf=soak system=NAME` would run. Raises UserError for an unknown system."""
    if system_name not in systems():
        raise UserError(f"unknown system {system_name!r}; known: {', '.join(systems())}")
    return composed("conf=soak", f"system={system_name}")


def systems() -> list[str]:
    """Every system that computes here: those of conf/system but what is set for cards."""
    names = sorted(path.stem for path in (CONFIGURATION / "system").glob("*.yaml"))
    return [name for name in names if not name.startswith(("gpu-", "paper-"))]


@command
def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m runner.soak", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--systems", nargs="+", metavar="NAME", default=systems(), help=f"default: {' '.join(systems())}"
    )
    parser.add_argument("--requests", type=int, default=10_000, help="a system (default: %(default)s)")
    parser.add_argument("--in-flight", type=int, default=48, help="at once (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=OUT, help="a record a system (default: results/local/soak)")
    parser.add_argument(
        "--ship", action="store_true", help="only put the records that are there into results/soak.json"
    )
    parser.add_argument("--show", action="store_true", help="only print the table of results/soak.json")
    arguments = parser.parse_args(argv)
    if arguments.show:
        print(table(shipped(SHIPPED)))
        return 0
    if arguments.ship:
        print(f"{ship(arguments.out, SHIPPED)} systems in {SHIPPED}")
        return 0
    for name, value in (("--requests", arguments.requests), ("--in-flight", arguments.in_flight)):
        if value < 1:
            raise UserError(f"{name} is {value}; it must be at least 1")
    if is_short():
        print("note: shortened: the first system, 60 requests", file=sys.stderr)
        arguments.systems, arguments.requests = arguments.systems[:1], min(arguments.requests, 60)
    for name in arguments.systems:
        configuration(name)
    require_writable(arguments.out)
    records = []
    for name in arguments.systems:
        records.append(soak(name, arguments.requests, arguments.in_flight))
        write(records[-1], arguments.out)
    print(table(records))
    failed = [(record["system"], Judgement(**j)) for record in records for j in record["judgements"] if not j["passed"]]
    for name, judgement in failed:
        print(f"FAILED: {name}: {judgement.name}: {judgement.said}")
    print(f"records: {arguments.out}")
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
