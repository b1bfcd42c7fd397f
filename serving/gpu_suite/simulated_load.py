"""One such load on the simulated backend: the same requests, systems, budgets and limits, on a card with the costs that were
fitted to other people's kernels, or with those of our engine's measured steps.

Elastic engines are processes without MPS, so that the card runs them in turns (`time_slice`, serving/cost/contention.py); of
CrossPool both pools are on the one card, and their stages slow each other as engines do that share it.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import Any

from serving import registry
from serving.cost.contention import Contention
from serving.cost.hardware import known_hardware, load_hardware
from serving.cost.measured_card import CardStages, InParts, known_measured, shipped_measured
from serving.cost.operators import CostModel
from serving.cost.stages import ModelStages, Stage, StageCosts
from serving.cost.table1 import published_spec
from serving.gpu_suite.loads import Case
from serving.gpu_suite.seeded import seeded
from serving.gpu_suite.serve import OPTIONS, SYSTEMS, p99_by_model, replay, summary
from serving.interface import Cluster, Demand, Device
from serving.sim.backend import SimulatedBackend

CARD = "h200"
MEASURED_CARD = "h200-measured"
_LIMIT_S = 600.0


@dataclass(frozen=True)
class Assumed:
    """What a simulation assumes of the card: whose costs stages have (`card`, as for `backend.card`), and of those of other
    people's kernels whether steps are done `in_parts` as with measured ones, and that stages with prompts in them take `prompts`
    times as long; and how engines contend."""

    card: str = CARD
    in_parts: bool = False
    prompts: float = 1.0
    contention: Contention = field(default_factory=lambda: Contention(mode="time_slice"))


def has_costs(case: Case, assumed: Assumed) -> bool:
    """Whether the costs that are assumed are known of all models: steps are measured of some."""
    if assumed.card in known_hardware():
        return True
    return assumed.card in known_measured() and set(case.models) <= set(shipped_measured(assumed.card).models())


def simulate(case: Case, assumed: Assumed) -> dict[str, Any]:
    """As a row of :mod:`serving.gpu_suite.serve`: P99 by model, and the summary of all. Raises UserError where there are no such
    costs of a model."""
    name, options = SYSTEMS[case.label]
    if name == "elastic":
        told = {key: getattr(assumed.contention, key) for key in ("interference", "slice_s", "switch_s")}
        options = {**options, "contention": assumed.contention.mode, **told}
    system = registry.create(name, {**OPTIONS, **options})
    backend = SimulatedBackend(
        assumed.card,
        lambda model, device: _stages(model.spec.name, assumed.card, assumed.in_parts, assumed.prompts),
    )
    system.start(system.plan(_cluster(name, case.pools_bytes), seeded(case.models), Demand()), backend)
    try:
        arrivals = case.arrivals()
        times = replay(system, arrivals, _LIMIT_S, backend.clock)
    finally:
        system.stop()
    return {"p99_by_model": p99_by_model(times, arrivals), **summary(times)}


class _OneCard:
    """Stages of whole models on one card."""

    def share(self, parts: int) -> ModelStages:
        return self if parts == 1 else super().share(parts)


class _FittedStages(_OneCard, StageCosts):
    """Those of other people's kernels; stages of more rows than a decode step can have take `prompts` times as long."""

    def __init__(self, name: str, card: str, prompts: float) -> None:
        super().__init__(published_spec(name), CostModel(load_hardware(card)))
        self._prompts = prompts

    def _prefill_attention_layer(self, new_tokens: int, past_tokens: int) -> Stage:
        return self._longer(super()._prefill_attention_layer(new_tokens, past_tokens))

    def _ffn_layer(self, layer: int, tokens: int) -> Stage:
        stage = super()._ffn_layer(layer, tokens)
        return self._longer(stage) if tokens > OPTIONS["max_batch"] else stage

    def _longer(self, stage: Stage) -> Stage:
        return Stage(self._prompts * stage.device_s, stage.work, stage.kernels)


class _PartedStages(InParts, _FittedStages):
    """The same, of steps in parts."""


class _MeasuredStages(_OneCard, CardStages):
    """Those of our engine, as measured."""


@functools.lru_cache(maxsize=32)  # costs are remembered with them
def _stages(name: str, card: str, in_parts: bool, prompts: float) -> ModelStages:
    if card in known_measured():
        return _MeasuredStages(published_spec(name), shipped_measured(card))
    return (_PartedStages if in_parts else _FittedStages)(name, card, prompts)


def _cluster(name: str, pools_bytes: tuple[int, int]) -> Cluster:
    """As :func:`serving.gpu_suite.serve.cluster_for`, of devices that are simulated."""
    if name != "crosspool":
        return Cluster((Device("gpu0", "cuda", 0, sum(pools_bytes), card=CARD),))
    return Cluster(
        tuple(Device(pool, "cuda", 0, size, card=CARD) for pool, size in zip(("kv", "weights"), pools_bytes))
    )
