"""A small declared search of a system's options before its run, so that no system is judged on a bad setting.

Each option in turn takes each of its declared values while the others stay; the best is kept (one pass of coordinate descent).
A setting is tried on the simulator, with the run's own system, models, devices, demand and the first requests of its trace;
better is a larger share of requests within their SLO, then a shorter mean end-to-end latency. A setting that does not fit is
passed over. Everything tried is written into the record, so a reader sees what was searched and how far apart settings were.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

from runner import metrics
from runner.config import BenchConfig
from runner.replay import Replay
from serving import registry
from serving.errors import UserError, one_line
from serving.interface import Cluster, Demand, ServedModel

if TYPE_CHECKING:
    from serving.sim.backend import SimulatedBackend

_DEFAULT_CARD = {"cpu": "cpu2", "cuda": "a100-40gb"}
_POLL_INTERVAL_S = 0.002


@dataclass(frozen=True)
class Tuned:
    """The options to run with, and the search as it stands in the record."""

    options: Mapping[str, Any]
    content: dict[str, Any]


def tuned(
    config: BenchConfig, cluster: Cluster, models: Sequence[ServedModel], demand: Demand, trace: Sequence[Any]
) -> Tuned:
    """The best options found for this cell. Without a declared search, those that are given."""
    declared = _declared(config)
    given = dict(config.system.options)
    if not declared:
        return Tuned(given, {})
    search = _Search(config, cluster, models, demand, list(islice(trace, config.tune.requests)))
    best, best_key = given, search.key(given)
    for name, values in declared.items():
        for value in values:
            options = {**best, name: value}
            key = search.key(options)
            if key is not None and (best_key is None or key > best_key):
                best, best_key = options, key
    if best_key is None:
        raise UserError(f"{config.system.name}: none of {len(search.tried)} settings can be tried: {search.problem}")
    everything = registry.all_options(config.system.name, best)
    chosen = {name: everything[name] for name in declared}
    content = {"simulated": search.hardware, "requests": len(search.trace), "tried": search.tried, "chosen": chosen}
    return Tuned(best, content)


def _declared(config: BenchConfig) -> dict[str, list[Any]]:
    """The system's own options to search, with their values; what it does not know is not its to tune. A rule that the system
    is given by name and that is not among its values makes it a variant (`admission: cap`), which tuning must leave one."""
    known = registry.all_options(config.system.name, config.system.options)
    declared = {**config.tune.options, **config.tune.systems.get(config.system.name, {})}
    for name, values in declared.items():
        if not isinstance(values, list | tuple) or not values:
            raise UserError(f"tune: option {name} is {values!r}; a list of values to try is wanted")
    return {
        name: list(values) for name, values in declared.items() if name in known and not _variant(known[name], values)
    }


def _variant(value: Any, values: Sequence[Any]) -> bool:
    return isinstance(value, str) and value not in values


class _Search:
    """Simulates settings, each once."""

    def __init__(
        self,
        config: BenchConfig,
        cluster: Cluster,
        models: Sequence[ServedModel],
        demand: Demand,
        trace: Sequence[Any],
    ) -> None:
        self._config, self._cluster, self._models, self._demand = config, cluster, models, demand
        self.trace = trace
        self.tried: list[dict[str, Any]] = []
        self.problem = ""
        self.hardware = self._backend().hardware
        self._keys: dict[str, tuple[float, float] | None] = {}

    def key(self, options: Mapping[str, Any]) -> tuple[float, float] | None:
        """How good a setting is; None where it cannot run."""
        name = repr(sorted(options.items()))
        if name not in self._keys:
            self._keys[name] = self._tried(options)
        return self._keys[name]

    def _tried(self, options: Mapping[str, Any]) -> tuple[float, float] | None:
        try:
            found = self._simulated(options)
        except UserError as error:
            self.problem = one_line(error)
            self.tried.append({"options": dict(options), "error": self.problem})
            return None
        attainment, e2el_ms = found["slo_attainment"], found["mean_e2el_ms"]
        self.tried.append({"options": dict(options), "slo_attainment": attainment, "mean_e2el_ms": e2el_ms})
        return round(attainment, 3), -(e2el_ms if e2el_ms is not None else float("inf"))

    def _simulated(self, options: Mapping[str, Any]) -> dict[str, Any]:
        config = self._config
        system = registry.create(config.system.name, options)
        backend = self._backend()
        try:
            system.start(system.plan(self._cluster, self._models, self._demand), backend)
            replay = Replay(system, self.trace, config.drain_timeout_s, _POLL_INTERVAL_S, backend.clock)
            observation = replay.run(len(self.trace), f"tune {config.system.name}")
        finally:
            system.stop()
        offered_s = self.trace[-1].arrival_s if self.trace else 0.0
        return metrics.summarise(observation, config.slo, offered_s)

    def _backend(self) -> SimulatedBackend:
        from serving.sim.backend import simulate_calibrated, simulate_card, simulate_datasheet

        card, backend = self._config.tune.card, self._config.backend
        if not card and backend.calibration:
            return simulate_calibrated(backend.calibration, prefill=backend.prefill)
        if not card and backend.card:
            return simulate_card(backend.card, prefill=backend.prefill)
        return simulate_datasheet(card or _DEFAULT_CARD[self._cluster.devices[0].kind])
