"""One run from its configuration to its record: models, trace, plan, start, replay, metrics, record, tracking."""

from __future__ import annotations

import shlex
import sys
from collections import defaultdict
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from runner import metrics, records
from runner.config import BackendConfig, BenchConfig, ModelEntry
from runner.identity import config_hash, run_id
from runner.observation import FAILED, Observation
from runner.provenance import provenance
from runner.records import Record
from runner.replay import Replay
from runner.tracking import track
from serving import registry
from serving.backend import Backend, RealBackend
from serving.errors import UserError, one_line
from serving.interface import Cluster, Demand, Device, Placement, ServedModel, System
from serving.spec import load_spec
from workloads.config import workload_from_dict
from workloads.errors import WorkloadError
from workloads.generate import ModelLimits, build_trace

_REPOSITORY = Path(__file__).resolve().parents[1]
_MOST_LENGTH_SAMPLES = 10_000


@dataclass(frozen=True)
class Outcome:
    """What became of a run: its record, and whether it was done already."""

    record: Record
    reused: bool


def record_directory(config: BenchConfig) -> Path:
    """Where the record of `config` lies. A relative results directory counts from the repository."""
    root = Path(config.results_dir)
    root = root if root.is_absolute() else _REPOSITORY / root
    return root / config.experiment / run_id(config.system.name, config.identity())


def execute(config: BenchConfig) -> Outcome:
    """Run `config` unless its complete record is there. Raises UserError for bad input (a failed record says why), and
    KeyboardInterrupt after the record of an interrupted run is written."""
    directory = record_directory(config)
    if not config.force:
        done = _finished(directory)
        if done is not None:
            return Outcome(done, reused=True)
    started_at = datetime.now(UTC)
    content: dict[str, Any] = {
        "run_id": directory.name,
        "config_hash": config_hash(config.identity()),
        "experiment": config.experiment,
        "system": config.system.name,
        "backend": config.backend.name,
        "hardware": _hardware(config),
        "config": asdict(config),
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "provenance": provenance(),
        "started_at": started_at.isoformat(),
    }
    try:
        observation, more = _observe(config)
    except (UserError, WorkloadError) as error:
        ended = {"status": records.FAILED, "error": one_line(error), "metrics": {}, "metrics_by_model": {}}
        ended["ended_at"] = datetime.now(UTC).isoformat()
        records.write_record(directory, {**content, **ended}, [], [])
        raise UserError(one_line(error)) from None
    offered_s = more["trace"]["duration_s"]
    content |= more | {
        "status": records.INTERRUPTED if observation.interrupted else records.COMPLETE,
        "error": observation.interrupted,
        "metrics": metrics.summarise(observation, config.slo, offered_s),
        "metrics_by_model": metrics.by_model(observation, config.slo, offered_s),
        "ended_at": datetime.now(UTC).isoformat(),
    }
    records.write_record(directory, content, observation.requests, observation.pools)
    record = records.read_record(directory)
    if observation.interrupted == "interrupted":
        raise KeyboardInterrupt
    if observation.interrupted:
        raise UserError(f"{directory.name}: {observation.interrupted}; what was seen is kept at {directory}")
    track(record, config.tracking, directory.parent)
    return Outcome(record, reused=False)


def _finished(directory: Path) -> Record | None:
    try:
        record = records.read_record(directory)
    except UserError:
        return None
    return record if record.status == records.COMPLETE else None


def _observe(config: BenchConfig) -> tuple[Observation, dict[str, Any]]:
    models = [_served_model(entry) for entry in config.models]
    limits = [
        ModelLimits(m.name, m.spec.vocab_size, m.spec.max_context_tokens, tokenizer=str(m.checkpoint)) for m in models
    ]
    workload = workload_from_dict(config.workload)
    trace = build_trace(workload, limits)
    system: System = registry.create(config.system.name, config.system.options)
    devices = tuple(Device(d.name, d.kind, d.index, d.memory_mib << 20) for d in config.devices)
    placement = system.plan(Cluster(devices), models, _demand(trace, trace.duration_s))
    try:
        backend = _backend(config.backend)
        system.start(placement, backend)
        replay = Replay(system, trace, config.drain_timeout_s, config.poll_interval_ms / 1e3, backend.clock)
        observation = replay.run(len(trace), f"{config.system.name} {config.experiment}")
    finally:
        system.stop()
    _count_never_submitted(observation, trace)
    more = {
        "placement": _describe(placement),
        "seeds": {key: value for key, value in asdict(workload).items() if "seed" in key},
        "trace": {
            "digest": trace.digest,
            "requests": len(trace),
            "duration_s": trace.duration_s,
            "summary": trace.summary(),
        },
    }
    return observation, more


def _backend(config: BackendConfig) -> Backend:
    if config.name == "real":
        return RealBackend()
    from serving.sim.backend import simulate_calibrated, simulate_card

    return simulate_card(config.card) if config.card else simulate_calibrated(config.calibration)


def _hardware(config: BenchConfig) -> str:
    """What the numbers are of: the devices, and under simulation the card or machine that is simulated."""
    devices = ", ".join(f"{device.name} ({device.memory_mib} MiB)" for device in config.devices)
    simulated = config.backend.card or config.backend.calibration
    return f"{devices}; simulated {simulated}" if simulated else devices


def _count_never_submitted(observation: Observation, trace: Any) -> None:
    """Requests that the run ended before they were due miss like any other that did not finish."""
    from runner.observation import RequestRow

    seen = {row.request_id for row in observation.requests}
    for planned in trace:
        if planned.request_id not in seen:
            observation.requests.append(
                RequestRow(
                    planned.request_id,
                    planned.model,
                    planned.prompt_tokens,
                    planned.output_tokens,
                    round(planned.arrival_s * 1e9),
                    outcome=FAILED,
                    reason=observation.interrupted or "never submitted",
                )
            )


def _served_model(entry: ModelEntry) -> ServedModel:
    checkpoint = Path(entry.checkpoint) if entry.checkpoint else None
    if checkpoint is not None and not checkpoint.is_absolute():
        checkpoint = _REPOSITORY / checkpoint
    if entry.make and (checkpoint is None or not checkpoint.exists()):
        checkpoint = _made(entry, checkpoint)
    if checkpoint is None:
        raise UserError(f"model {entry.name}: needs a checkpoint directory, or `make` to make one")
    return ServedModel(load_spec(checkpoint, entry.name), checkpoint, entry.dtype, entry.dummy)


def _made(entry: ModelEntry, checkpoint: Path | None) -> Path:
    from serving.checkpoints.make import default_directory, make_checkpoint

    unknown = set(entry.make) - {"arch", "size", "seed", "dtype"}
    if unknown or not {"arch", "size"} <= set(entry.make):
        raise UserError(
            f"model {entry.name}: make wants arch and size, and may have seed and dtype; got {dict(entry.make)}"
        )
    arch, size, seed = entry.make["arch"], entry.make["size"], int(entry.make.get("seed", 0))
    dtype = entry.make.get("dtype", "float32")
    if checkpoint is None:
        base = default_directory(arch, size)
        checkpoint = base.with_name(f"{base.name}-{dtype}-s{seed}")
    return make_checkpoint(arch, size, checkpoint, seed, dtype)


def _demand(trace: Any, duration_s: float) -> Demand:
    """What a planner may know: each model's rate and lengths, as in the trace."""
    lengths: dict[str, list[tuple[int, int]]] = defaultdict(list)
    counts: dict[str, int] = defaultdict(int)
    for request in trace:
        counts[request.model] += 1
        if len(lengths[request.model]) < _MOST_LENGTH_SAMPLES:
            lengths[request.model].append((request.prompt_tokens, request.output_tokens))
    rates = {model: count / duration_s for model, count in counts.items()} if duration_s > 0 else {}
    return Demand(rates, lengths)


def _describe(placement: Placement) -> list[dict[str, Any]]:
    return [
        {
            "device": plan.device.name,
            "role": plan.role,
            "memory_bytes": plan.device.memory_bytes,
            "weights_bytes": dict(plan.weights_bytes),
            "kv_bytes": plan.kv_bytes,
            "kv_quota_bytes": dict(plan.kv_quota_bytes),
        }
        for plan in placement.devices
    ]
