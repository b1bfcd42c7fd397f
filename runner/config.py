"""What one run is, as frozen dataclasses: everything past `bench.py` sees these and no Hydra object."""

from __future__ import annotations

import dataclasses
import math
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from serving.errors import UserError
from serving.spec import element_bytes

BACKENDS = ("real", "sim")
TRACKING_MODES = ("offline", "online", "disabled")


@dataclass(frozen=True)
class ModelEntry:
    """A model to serve. A missing `checkpoint` is made from `make` (architecture, size, seed) where that is given. One that is
    only simulated needs no weights: `published` names a configuration of serving/checkpoints/published."""

    name: str
    checkpoint: str = ""
    dtype: str = "float32"
    dummy: bool = False
    make: Mapping[str, Any] = field(default_factory=dict)
    published: str = ""


@dataclass(frozen=True)
class SystemConfig:
    name: str
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class DeviceEntry:
    """A device. `card` is what it is where simulated (empty: `backend.card`), `node` the server it is in. In a configuration
    `count` stands for that many alike, of which each `per_node` (all, without it) are in one server."""

    name: str
    memory_mib: int
    kind: str = "cpu"
    index: int = 0
    node: int = 0
    card: str = ""


@dataclass(frozen=True)
class BackendConfig:
    """`real` computes; `sim` takes time as a `card` of conf/hardware would, or as the `calibration` file says this machine
    does. `oversubscribe` lets more CPU devices compute than there are cores, which the record then says. Without `prefill`
    (sim only) prompts come with their KV, as from prefill engines of their own: the paper measures decode only."""

    name: str = "real"
    card: str = ""
    calibration: str = ""
    oversubscribe: bool = False
    prefill: bool = True


@dataclass(frozen=True)
class SLO:
    """A request meets it when its TTFT and its TPOT both do."""

    ttft_ms: float
    tpot_ms: float


@dataclass(frozen=True)
class Tracking:
    mode: str = "offline"
    project: str = "crosspool"
    group: str = ""
    entity: str = ""


@dataclass(frozen=True)
class Tune:
    """A search of the system's options before the run (:mod:`runner.tune`): `options` name the values to try, `systems` those
    of one system beyond them. It simulates `card` and the first `requests` requests."""

    options: Mapping[str, Any] = field(default_factory=dict)
    systems: Mapping[str, Any] = field(default_factory=dict)
    requests: int = 300
    card: str = ""


@dataclass(frozen=True)
class BenchConfig:
    """One run. `timeline` keeps what workers did in the record. `workload` is handed to the workloads package as it is; `experiment`
    names the folder of its record. Runs that differ in `repeat` alone ask the same: each has a record of its own."""

    experiment: str
    system: SystemConfig
    models: tuple[ModelEntry, ...]
    devices: tuple[DeviceEntry, ...]
    workload: Mapping[str, Any]
    slo: SLO
    backend: BackendConfig = field(default_factory=BackendConfig)
    results_dir: str = "results/local"
    drain_timeout_s: float = 300.0
    poll_interval_ms: float = 2.0
    force: bool = False
    timeline: bool = False
    repeat: int = 0
    tune: Tune = field(default_factory=Tune)
    tracking: Tracking = field(default_factory=Tracking)

    def identity(self) -> dict[str, Any]:
        """What the run computes: the resolved configuration without where it is kept, tracked or forced."""
        content = dataclasses.asdict(self)
        for key in ("results_dir", "tracking", "force", "experiment"):
            content.pop(key)
        # What came later counts only where it is used, so that older records are still found.
        for key in ("timeline", "repeat"):
            if not content[key]:
                content.pop(key)
        if not content["tune"]["options"]:
            content.pop("tune")
        if not content["backend"]["oversubscribe"]:
            content["backend"].pop("oversubscribe")
        if content["backend"]["prefill"]:
            content["backend"].pop("prefill")
        for entry, keys in [(m, ("published",)) for m in content["models"]] + [
            (d, ("node", "card")) for d in content["devices"]
        ]:
            for key in keys:
                if not entry[key]:
                    entry.pop(key)
        return content


def bench_from_dict(content: Mapping[str, Any]) -> BenchConfig:
    """The configuration that a plain dict (a resolved Hydra config) describes. Raises UserError for a key that is unknown
    or missing and for a value that makes no sense. `workload.rate` is short for `workload.arrivals.rate_rps`."""
    content = {key: value for key, value in content.items() if key not in ("conf", "hydra")}
    content["workload"] = _with_rate(content.get("workload"))
    models = _entries(ModelEntry, content.pop("models", None), "models")
    devices = _entries(DeviceEntry, _each(content.pop("devices", None)), "devices")
    config = _build(
        BenchConfig,
        {
            **content,
            "models": models,
            "devices": devices,
            "system": _build(SystemConfig, content.get("system"), "system"),
            "backend": _build(BackendConfig, content.get("backend", {}), "backend"),
            "slo": _build(SLO, content.get("slo"), "slo"),
            "tune": _build(Tune, content.get("tune", {}), "tune"),
            "tracking": _build(Tracking, content.get("tracking", {}), "tracking"),
        },
        "the configuration",
    )
    _validate(config)
    return config


def _with_rate(workload: Any) -> Any:
    """`workload` with its shorthand `rate` spelled out, so that both spellings are one run."""
    if not isinstance(workload, Mapping):
        return workload
    workload = dict(workload)
    rate = workload.pop("rate", None)
    if rate is not None:
        workload["arrivals"] = {**(workload.get("arrivals") or {}), "rate_rps": rate}
    return workload


def _each(devices: Any) -> Any:
    """Device entries with those that have a `count` written out, one by one."""
    if not isinstance(devices, list | tuple):
        return devices
    entries: list[Any] = []
    for number, entry in enumerate(devices):
        if not isinstance(entry, Mapping) or "count" not in entry:
            entries.append(entry)
            continue
        entry = dict(entry)
        count = entry.pop("count")
        per_node = entry.pop("per_node", count)
        if not all(isinstance(value, int) and value >= 1 for value in (count, per_node)):
            raise UserError(f"devices[{number}]: count and per_node are whole numbers of at least 1")
        name, first_node = entry.get("name", ""), entry.get("node", 0)
        entries += [
            {**entry, "name": f"{name}:{i}", "index": i, "node": first_node + i // per_node} for i in range(count)
        ]
    return entries


def _entries(cls: type, entries: Any, where: str) -> tuple:
    if not entries:
        raise UserError(f"{where}: none given; name at least one")
    if not isinstance(entries, list | tuple):
        raise UserError(f"{where}: a list is wanted, got {entries!r}")
    return tuple(_build(cls, entry, f"{where}[{number}]") for number, entry in enumerate(entries))


def _build(cls: type, content: Any, where: str) -> Any:
    if not isinstance(content, Mapping):
        raise UserError(f"{where}: a mapping is wanted, got {content!r}")
    known = [f.name for f in dataclasses.fields(cls)]
    for key in content:
        if key not in known:
            raise UserError(f"{where}: unknown key {key!r}; known: {', '.join(known)}")
    hints = typing.get_type_hints(cls)
    values = {
        key: _checked(value, hints[key], key if cls is BenchConfig else f"{where}.{key}")
        for key, value in content.items()
    }
    try:
        return cls(**values)
    except TypeError as error:
        raise UserError(f"{where}: {str(error).split('__init__() ')[-1]}") from None


def _checked(value: Any, hint: Any, where: str) -> Any:
    """`value` as the field's type wants it: YAML gives 3 where a name or a number with a fraction may stand."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if hint is float and number and math.isfinite(value):
        return float(value)
    if hint is str and (number or isinstance(value, str)):
        return str(value)
    if hint is int and number and isinstance(value, int) or hint is bool and isinstance(value, bool):
        return value
    if typing.get_origin(hint) is Mapping and isinstance(value, Mapping):
        return value
    if hint not in _IN_WORDS and typing.get_origin(hint) is not Mapping:
        return value  # built and checked already
    raise UserError(f"{where} is {value!r}; it must be {_IN_WORDS.get(hint, 'a mapping')}")


_IN_WORDS = {float: "a number", str: "text", int: "a whole number", bool: "true or false"}


def _validate(config: BenchConfig) -> None:
    backend = config.backend
    if backend.name not in BACKENDS:
        raise UserError(f"unknown backend {backend.name!r}; known: {', '.join(BACKENDS)}")
    if backend.name == "sim" and bool(backend.card) == bool(backend.calibration):
        raise UserError("backend sim: name either a card (backend.card) or a calibration file (backend.calibration)")
    if config.timeline and backend.name != "real":
        raise UserError("timeline=true: only workers that compute leave timelines; use backend=real")
    if config.repeat < 0:
        raise UserError(f"repeat is {config.repeat}; it must be at least 0")
    if config.tune.requests < 1:
        raise UserError(f"tune.requests is {config.tune.requests}; it must be at least 1")
    if backend.name == "real" and not backend.prefill:
        raise UserError("backend.prefill=false is for backend=sim: the real backend computes every prompt")
    if config.tracking.mode not in TRACKING_MODES:
        raise UserError(f"unknown tracking.mode {config.tracking.mode!r}; known: {', '.join(TRACKING_MODES)}")
    names = [model.name for model in config.models]
    if len(set(names)) < len(names):
        raise UserError(f"models: names must differ, got {', '.join(names)}")
    for model in config.models:
        element_bytes(model.dtype)  # raises for a dtype that nothing computes in
    for name in ("drain_timeout_s", "poll_interval_ms"):
        if getattr(config, name) <= 0:
            raise UserError(f"{name} is {getattr(config, name):g}; it must be a positive number")
    for slo in ("ttft_ms", "tpot_ms"):
        if not getattr(config.slo, slo) > 0:
            raise UserError(f"slo.{slo} is {getattr(config.slo, slo):g}; it must be a positive number of milliseconds")
    labels = [device.name for device in config.devices]
    if len(set(labels)) < len(labels):
        raise UserError(f"devices: names must differ, got {', '.join(labels)}")
    for device in config.devices:
        if device.memory_mib < 1:
            raise UserError(f"device {device.name}: memory_mib is {device.memory_mib}; it must be at least 1")
    if Path(config.experiment).name != config.experiment or config.experiment[:1] in ("", "."):
        raise UserError(f"experiment {config.experiment!r} must be a plain folder name")
