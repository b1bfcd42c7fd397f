"""What a placement would do under the true rates, from the cost model: how much of the load it serves, how fast. Pure.

A fixed point of Little's law. A running request takes a token a step; a step waits for one step of every other active model
on its devices; requests in flight = rate x (prefill + tokens x time between tokens). An instance is saturated when more are
in flight than its KV or its batch holds, mean and two standard deviations. Arrivals are taken as Poisson, lengths by their means.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from serving.cost.stages import ModelStages
from serving.interface import Demand, ServedModel
from serving.memory.kv_pool import KVGeometry
from serving.options import EngineOptions
from serving.parallel.capacity import share_model
from serving.parallel.costs import GroupCosts, StepShape
from serving.parallel.host import Instance
from serving.parallel.measured_costs import group_costs

_ROUNDS = 12
_SPREADS = 2.0  # room that counts as enough: so many standard deviations above the mean of a Poisson number in flight
_UNKNOWN_RATE_RPS, _UNKNOWN_LENGTHS = 1.0, (128, 128)  # where nothing is known of a model, all count alike


@dataclass(frozen=True)
class Load:
    """One model's demand by means: `context_tokens` is what a decode step of a request finds in its cache."""

    rate_rps: float
    prompt_tokens: float
    output_tokens: float
    context_tokens: float
    longest: tuple[int, ...]  # prompt and output of each sample, ascending

    @classmethod
    def of(cls, demand: Demand, model: str) -> Load:
        samples = list(demand.lengths.get(model) or [_UNKNOWN_LENGTHS])
        outputs = sum(output for _, output in samples)
        return cls(
            rate_rps=demand.rate_rps.get(model, 0.0 if demand.rate_rps else _UNKNOWN_RATE_RPS),
            prompt_tokens=sum(prompt for prompt, _ in samples) / len(samples),
            output_tokens=outputs / len(samples),
            context_tokens=sum(output * (prompt + output / 2) for prompt, output in samples) / outputs,
            longest=tuple(sorted(prompt + output for prompt, output in samples)),
        )

    def share_within(self, tokens: float) -> float:
        """Share of the requests that have at most so many tokens."""
        return sum(length <= tokens for length in self.longest) / len(self.longest)

    def kv_tokens(self) -> float:
        """Tokens in the cache at a time, but for a factor that all models share (the time of one token)."""
        return self.rate_rps * self.output_tokens * self.context_tokens


@dataclass(frozen=True)
class Score:
    """Better is larger: first the share of requests served, then speed (`latency_s` is seconds a generated token, prefill
    included)."""

    served: float
    latency_s: float

    @property
    def key(self) -> tuple[float, float]:
        return round(self.served, 3), -self.latency_s


class Predictor:
    """Scores placements of `models` under `demand`; remembers step costs, so one predictor serves a whole search."""

    def __init__(self, stages: Mapping[str, ModelStages], demand: Demand, options: EngineOptions) -> None:
        self._stages, self._limits, self._page_bytes = stages, options.limits, options.page_bytes
        self.loads = {name: Load.of(demand, name) for name in stages}
        self._costs: dict[tuple[str, int, int], GroupCosts] = {}
        self._steps: dict[tuple[str, int, int, int], float] = {}
        self._prefills: dict[tuple[str, int, int], float] = {}

    def score(self, instances: Sequence[Instance]) -> Score:
        """Of what is placed. Models that are not placed count as not served."""
        served = self.served_by_model(instances)
        total = sum(load.rate_rps for load in self.loads.values()) or 1.0
        tokens = sum(load.rate_rps * load.output_tokens for load in self.loads.values()) or 1.0
        share = sum(self.loads[name].rate_rps * part for name, (part, _) in served.items()) / total
        slow = sum(self.loads[n].rate_rps * self.loads[n].output_tokens * seconds for n, (_, seconds) in served.items())
        return Score(share, slow / tokens)

    def served_by_model(self, instances: Sequence[Instance]) -> dict[str, tuple[float, float]]:
        """By model: the share of its requests that is served, and seconds a token."""
        split = self._split(instances)
        gaps = self._gaps(instances, split)
        result = {}
        for name, load in self.loads.items():
            mine = [n for n, instance in enumerate(instances) if instance.model.name == name]
            if not mine or not load.rate_rps:
                result[name] = (1.0 if not load.rate_rps and mine else 0.0, 0.0)
                continue
            share = seconds = 0.0
            for n in mine:
                part = split[n] / load.rate_rps
                fitting = load.share_within(self._kv_tokens(instances[n]))
                running = self._running(n, instances, split, gaps)
                wanted = running + _SPREADS * math.sqrt(running)
                share += part * fitting * min(1.0, self._room(instances[n]) / wanted)
                seconds += part * (gaps[n] + self._prefill_s(instances[n]) / load.output_tokens)
            result[name] = (share, seconds)
        return result

    # -- one instance --------------------------------------------------------------------------------------------------
    def _split(self, instances: Sequence[Instance]) -> list[float]:
        """Requests a second of each instance: a model's replicas share them by their KV."""
        total: dict[str, float] = {}
        for instance in instances:
            total[instance.model.name] = total.get(instance.model.name, 0.0) + self._all_kv_tokens(instance)
        return [
            self.loads[i.model.name].rate_rps * self._all_kv_tokens(i) / max(total[i.model.name], 1e-9)
            for i in instances
        ]

    def _kv_tokens(self, instance: Instance) -> float:
        """Tokens that one request can have: the KV of one replica, in whole pages of every layer."""
        geometry = self._geometry(instance)
        pages = instance.kv_bytes // self._page_bytes // geometry.num_layers
        return pages * self._page_bytes / geometry.token_bytes

    def _geometry(self, instance: Instance) -> KVGeometry:
        share = share_model(instance.model, instance.group, 0)
        return KVGeometry.of(share.spec, share.dtype)

    def _all_kv_tokens(self, instance: Instance) -> float:
        return self._kv_tokens(instance) * instance.group.dp

    def _room(self, instance: Instance) -> float:
        """Requests that all replicas hold at once."""
        load = self.loads[instance.model.name]
        pages = self._geometry(instance).pages(math.ceil(load.prompt_tokens + load.output_tokens), self._page_bytes)
        by_kv = instance.kv_bytes // self._page_bytes / pages
        return instance.group.dp * min(by_kv, float(self._limits.max_batch))

    def _running(self, n: int, instances: Sequence[Instance], split: Sequence[float], gaps: Sequence[float]) -> float:
        load = self.loads[instances[n].model.name]
        return split[n] * (self._prefill_s(instances[n]) + load.output_tokens * gaps[n])

    # -- all of them ---------------------------------------------------------------------------------------------------
    def _gaps(self, instances: Sequence[Instance], split: Sequence[float]) -> list[float]:
        """Seconds between two tokens of a request of each instance."""
        neighbours = [
            [m for m, b in enumerate(instances) if m != n and set(a.group.devices) & set(b.group.devices)]
            for n, a in enumerate(instances)
        ]
        steps = [self._step_s(instance, 1) for instance in instances]
        gaps = list(steps)
        for _ in range(_ROUNDS):
            active, busy = [], []
            for n, instance in enumerate(instances):
                running = min(self._running(n, instances, split, gaps), self._room(instance))
                active.append(-math.expm1(-running))
                each = running / max(active[n], 1e-9) / instance.group.dp
                steps[n] = self._step_s(instance, max(1, round(each)))
                busy.append(min(split[n] * self._prefill_s(instance), 0.9))
            for n in range(len(instances)):
                prefilling = min(busy[n] + sum(busy[m] for m in neighbours[n]), 0.9)
                gaps[n] = (steps[n] + sum(active[m] * steps[m] for m in neighbours[n])) / (1.0 - prefilling)
        return gaps

    # -- costs ---------------------------------------------------------------------------------------------------------
    def _of(self, instance: Instance) -> GroupCosts:
        group = instance.group
        key = (instance.model.name, group.tp, group.dp)
        if key not in self._costs:
            self._costs[key] = group_costs(self._stages[instance.model.name], group)
        return self._costs[key]

    def _step_s(self, instance: Instance, batch: int) -> float:
        """A decode step with `batch` requests in each replica."""
        group, name = instance.group, instance.model.name
        key = (name, group.tp, group.dp, batch)
        if key not in self._steps:
            shape = StepShape(batch, max(1, round(batch * self.loads[name].context_tokens)))
            self._steps[key] = self._of(instance).step_s([shape] * group.dp)
        return self._steps[key]

    def _prefill_s(self, instance: Instance) -> float:
        """A prompt, in chunks, while the other replicas have none."""
        group, name = instance.group, instance.model.name
        key = (name, group.tp, group.dp)
        if key not in self._prefills:
            prompt = self.loads[name].prompt_tokens
            chunks = math.ceil(prompt / self._limits.prefill_chunk)
            chunk = StepShape(chunks=((max(1, round(prompt / chunks)), round(prompt * (chunks - 1) / chunks / 2)),))
            self._prefills[key] = chunks * self._of(instance).step_s([chunk, *[StepShape()] * (group.dp - 1)])
        return self._prefills[key]


def kv_demand(models: Sequence[ServedModel], loads: Mapping[str, Load]) -> dict[str, float]:
    """How KV of a device is divided by demand: bytes in the cache at a time, and for a model without load a little."""
    wanted = {m.name: loads[m.name].kv_tokens() * m.spec.kv_bytes_per_token(m.dtype) for m in models}
    least = 0.02 * max(wanted.values()) or 1.0
    return {name: max(value, least) for name, value in wanted.items()}
