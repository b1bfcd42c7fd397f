"""One such load on the simulated backend: the same requests, systems, budgets and limits, on a card with the costs that were
fitted to other people's kernels.

Elastic engines are processes without MPS, so that the card runs them in turns (`time_slice`, serving/cost/contention.py); of
CrossPool both pools are on the one card, and their stages slow each other as engines do that share it.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import Any

from serving import registry
from serving.cost.contention import Contention, Load, slowdowns
from serving.cost.hardware import load_hardware
from serving.cost.operators import CostModel
from serving.cost.stages import Stage, StageCosts
from serving.cost.table1 import published_spec
from serving.gpu_suite.loads import Case
from serving.gpu_suite.seeded import seeded
from serving.gpu_suite.serve import OPTIONS, SYSTEMS, p99_by_model, replay, summary
from serving.interface import Cluster, Demand, Device
from serving.sim.backend import SimulatedBackend

CARD = "h200"
_LIMIT_S = 600.0


@dataclass(frozen=True)
class Assumed:
    """What a simulation assumes of the card beside the costs of other people's kernels: that steps with prompts in them take
    `prompts` times as long with ours, and how engines contend."""

    prompts: float = 1.0
    contention: Contention = field(default_factory=lambda: Contention(mode="time_slice"))


def simulate(case: Case, assumed: Assumed) -> dict[str, Any]:
    """As a row of :mod:`serving.gpu_suite.serve`: P99 by model, and the summary of all."""
    name, options = SYSTEMS[case.label]
    if name == "elastic":
        told = {key: getattr(assumed.contention, key) for key in ("interference", "slice_s", "switch_s")}
        options = {**options, "contention": assumed.contention.mode, **told}
    system = registry.create(name, {**OPTIONS, **options})
    backend = SimulatedBackend(
        CARD, lambda model, device: _stages(model.spec.name, name == "crosspool", assumed.prompts)
    )
    system.start(system.plan(_cluster(name, case.pools_bytes), seeded(case.models), Demand()), backend)
    try:
        arrivals = case.arrivals()
        times = replay(system, arrivals, _LIMIT_S, backend.clock)
    finally:
        system.stop()
    return {"p99_by_model": p99_by_model(times, arrivals), **summary(times)}


class _CardStages(StageCosts):
    """Whole models on one card; stages of more rows than a decode step can have take `prompts` times as long. Where
    `halves_share`, stages of both halves of a model may run at once: beside another that streams its memory, each takes as
    much longer as a kernel of an engine beside that of another (`share`)."""

    def __init__(self, name: str, halves_share: bool, prompts: float) -> None:
        super().__init__(published_spec(name), CostModel(load_hardware(CARD)))
        self._halves_share, self._prompts = halves_share, prompts

    def share(self, parts: int) -> StageCosts:
        return self if parts == 1 else super().share(parts)

    def beside_stream(self, operator: str) -> float:
        if not self._halves_share:
            return 1.0
        stage = self.attention(1, 64) if operator == "stage_decode" else self.ffn(self.spec.num_layers - 1, 1)
        stream = Load(1.0, self.hardware.memory_bandwidth, 0.0)
        return slowdowns([stage.load(), stream], self.hardware, Contention(), self.dtype)[0]

    def _prefill_attention_layer(self, new_tokens: int, past_tokens: int) -> Stage:
        return self._longer(super()._prefill_attention_layer(new_tokens, past_tokens))

    def _ffn_layer(self, layer: int, tokens: int) -> Stage:
        stage = super()._ffn_layer(layer, tokens)
        return self._longer(stage) if tokens > OPTIONS["max_batch"] else stage

    def _longer(self, stage: Stage) -> Stage:
        return Stage(self._prompts * stage.device_s, stage.work, stage.kernels)


_stages = functools.lru_cache(maxsize=8)(_CardStages)  # costs are remembered with them


def _cluster(name: str, pools_bytes: tuple[int, int]) -> Cluster:
    """As :func:`serving.gpu_suite.serve.cluster_for`, of devices that are simulated."""
    if name != "crosspool":
        return Cluster((Device("gpu0", "cuda", 0, sum(pools_bytes), card=CARD),))
    return Cluster(
        tuple(Device(pool, "cuda", 0, size, card=CARD) for pool, size in zip(("kv", "weights"), pools_bytes))
    )
