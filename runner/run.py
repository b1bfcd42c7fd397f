"""One run from its configuration to its record: models, trace, plan, start, replay, metrics, record, tracking."""

from __future__ import annotations

import dataclasses
import tempfile
from collections import defaultdict
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from runner import locks, machine, metrics, records
from runner.config import BackendConfig, BenchConfig, ModelEntry
from runner.identity import config_hash, run_id
from runner.observation import FAILED, Observation, RequestRow
from runner.provenance import provenance
from runner.records import Record
from runner.replay import INTERRUPTED, Replay
from runner.sampler import SystemSampler
from runner.spans import kept_spans
from runner.tracking import track
from runner.tune import tuned
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
    """What became of a run: its record, whether it was done already, and why it is not in W&B where it should be."""

    record: Record
    reused: bool
    untracked: str = ""


def record_directory(config: BenchConfig) -> Path:
    """Where the record of `config` lies. A relative results directory counts from the repository."""
    root = Path(config.results_dir)
    root = root if root.is_absolute() else _REPOSITORY / root
    return root / config.experiment / run_id(config.system.name, config.identity())


def execute(config: BenchConfig, command: str = "") -> Outcome:
    """Run `config` unless its complete record is there. `command` is the command line that runs it again. Raises UserError
    for bad input (a failed record says why), and KeyboardInterrupt after the record of an interrupted run is written."""
    directory = record_directory(config)
    records.require_writable(directory.parent)
    with locks.exclusive(directory.parent / ".locks" / directory.name, f"run {directory.name}"):
        done = _finished(directory)
        if done is not None and not config.force:
            return Outcome(done, reused=True)
        record = _run(config, directory, command, done)
    if record.content["error"] == INTERRUPTED:
        raise KeyboardInterrupt
    if record.status != records.COMPLETE:
        kept = "what was seen" if done is None else "the complete record of before"
        raise UserError(f"{directory.name}: {record.content['error']}; {kept} is kept at {directory}")
    try:
        track(record, config.tracking, directory.parent)
    except UserError as error:
        return Outcome(record, reused=False, untracked=one_line(error))
    return Outcome(record, reused=False)


def _run(config: BenchConfig, directory: Path, command: str, done: Record | None) -> Record:
    """Run `config` and leave a record whatever happens, except that one which is `done` gives way to a complete one only."""
    content: dict[str, Any] = {
        "run_id": directory.name,
        "config_hash": config_hash(config.identity()),
        "experiment": config.experiment,
        "system": config.system.name,
        "backend": config.backend.name,
        "hardware": _hardware(config),
        "oversubscribed": _oversubscribed(config),
        "config": asdict(config),
        "command": command,
        "provenance": provenance(),
        "started_at": datetime.now(UTC).isoformat(),
    }

    def written(status: str, error: str, rows: Observation, **more: Any) -> Record:
        ended = {"status": status, "error": error, "ended_at": datetime.now(UTC).isoformat()}
        whole = {"metrics": {}, "metrics_by_model": {}, **content, **ended, **more}
        if done is not None and status != records.COMPLETE:
            return Record(directory, whole)
        path = records.write_record(directory, whole, rows.requests, rows.pools, rows.timeline)
        return records.read_record(path)

    try:
        observation, more = _observe(config)
    except KeyboardInterrupt:
        return written(records.INTERRUPTED, INTERRUPTED, Observation([]))
    except (UserError, WorkloadError) as error:
        written(records.FAILED, one_line(error), Observation([]))
        raise UserError(one_line(error)) from None
    except Exception as error:
        written(records.FAILED, one_line(f"{type(error).__name__}: {error}"), Observation([]))
        raise
    offered_s = more["trace"]["duration_s"]
    return written(
        records.INTERRUPTED if observation.interrupted else records.COMPLETE,
        observation.interrupted,
        observation,
        metrics=metrics.summarise(observation, config.slo, offered_s),
        metrics_by_model=metrics.by_model(observation, config.slo, offered_s),
        **more,
    )


def _finished(directory: Path) -> Record | None:
    try:
        record = records.read_record(directory)
    except UserError:
        return None
    return record if record.status == records.COMPLETE else None


def _observe(config: BenchConfig) -> tuple[Observation, dict[str, Any]]:
    models = served_models(config)
    limits = [
        ModelLimits(m.name, m.spec.vocab_size, m.spec.max_context_tokens, tokenizer=str(m.checkpoint)) for m in models
    ]
    workload = workload_from_dict(config.workload)
    trace = build_trace(workload, limits)
    cluster, demand = cluster_of(config), demand_of(trace, trace.duration_s)
    tuning = tuned(config, cluster, models, demand, trace)
    spans = tempfile.TemporaryDirectory(prefix="timeline-") if config.timeline else None
    options = {**tuning.options, **({"timeline_dir": spans.name} if spans else {})}
    system: System = registry.create(config.system.name, options)
    computing, cards = tuple(dict.fromkeys(_cores(config))), _cards(config)
    placement = system.plan(cluster, models, demand)
    with locks.computing(computing, (card.uuid for card in cards)):
        try:
            backend = _backend(config.backend)
            system.start(placement, backend)
            poll_s, simulated = config.poll_interval_ms / 1e3, config.backend.name == "sim"
            replay = Replay(system, trace, config.drain_timeout_s, poll_s, backend.clock, lengths_only=simulated)
            observation, sampled = _watched(replay, len(trace), config, computing)
            notes = system.notes()
        finally:
            system.stop()
    _count_never_submitted(observation, trace)
    if spans:
        if not observation.interrupted:  # workers that were ended early may have left none
            observation.timeline = kept_spans(spans.name)
        spans.cleanup()
    more = {
        "system_series": sampled,
        "tuning": tuning.content,
        "placement": _describe(placement),
        "notes": notes,
        "seeds": {key: value for key, value in asdict(workload).items() if "seed" in key},
        "trace": {
            "digest": trace.digest,
            "requests": len(trace),
            "duration_s": trace.duration_s,
            "summary": trace.summary(),
        },
    }
    return observation, more


def _watched(
    replay: Replay, total: int, config: BenchConfig, computing: tuple[int, ...]
) -> tuple[Observation, list[dict[str, Any]]]:
    """The replay, and what the machine did meanwhile; nothing of a machine that only simulates."""
    label = f"{config.system.name} {config.experiment}"
    if config.backend.name != "real":
        return replay.run(total, label), []
    gpus = any(device.kind == "cuda" for device in config.devices)
    before = machine.CpuUse.now(computing)
    with SystemSampler(computing, gpus) as sampler:
        observation = replay.run(total, label)
    if computing:
        observation.other_cpu_share = machine.CpuUse.now(computing).others_share_since(before)
    return observation, sampler.samples


def _backend(config: BackendConfig) -> Backend:
    if config.name == "real":
        return RealBackend()
    from serving.sim.backend import simulate_calibrated, simulate_card

    if config.card:
        return simulate_card(config.card, prefill=config.prefill)
    return simulate_calibrated(config.calibration, prefill=config.prefill)


def _cores(config: BenchConfig) -> tuple[int, ...]:
    """The cores that the run computes on; none where it simulates."""
    return machine.cores_of(config.devices, config.backend.oversubscribe) if config.backend.name == "real" else ()


def _cards(config: BenchConfig) -> tuple[machine.Card, ...]:
    """The cards that the run computes on; none where it simulates."""
    return machine.cards_of(config.devices) if config.backend.name == "real" else ()


def _oversubscribed(config: BenchConfig) -> bool:
    """Whether devices share cores; False also where there are no such devices, which the run itself refuses."""
    try:
        cores = _cores(config)
    except UserError:
        return False
    return len(set(cores)) < len(cores)


def _hardware(config: BenchConfig) -> str:
    """What the numbers are of: the devices, and under simulation the card or machine that is simulated."""
    devices = ", ".join(f"{device.name} ({device.memory_mib} MiB)" for device in config.devices)
    cards = dict.fromkeys(device.card or config.backend.card for device in config.devices)
    simulated = ", ".join(filter(None, cards)) or config.backend.calibration
    if _oversubscribed(config):
        return f"{devices}; sharing {len(set(_cores(config)))} cores"
    return f"{devices}; simulated {simulated}" if config.backend.name == "sim" else devices


def _count_never_submitted(observation: Observation, trace: Any) -> None:
    """Requests that the run ended before they were due miss like any other that did not finish."""
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


def cluster_of(config: BenchConfig) -> Cluster:
    """The devices of a run."""
    return Cluster(tuple(Device(d.name, d.kind, d.index, d.memory_mib << 20, d.node, d.card) for d in config.devices))


def served_models(config: BenchConfig) -> list[ServedModel]:
    """The models of a run, checkpoints made where they are to be and are not there."""
    return [_served_model(entry, config.backend.name) for entry in config.models]


def _served_model(entry: ModelEntry, backend: str) -> ServedModel:
    if entry.published and not (entry.checkpoint or entry.make):
        if backend != "sim" and not entry.dummy:
            raise UserError(
                f"model {entry.name}: only its published configuration is here; the {backend} backend needs a checkpoint "
                "directory (models[].checkpoint) or seeded values in its place (models[].dummy), backend=sim does not"
            )
        from serving.cost.table1 import published_spec

        spec = dataclasses.replace(published_spec(entry.published), name=entry.name)
        return ServedModel(spec, Path(entry.published), entry.dtype, entry.dummy)
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


def demand_of(trace: Any, duration_s: float) -> Demand:
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
