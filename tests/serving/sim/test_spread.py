"""Steps that should be alike differ by the factors of their stages' spread, the same ones in every run."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest

from baselines.swap.request_level import RequestLevel
from runner.replay import Replay
from serving import registry
from serving.cost.hardware import load_hardware
from serving.cost.operators import CostModel
from serving.cost.stages import StageCosts
from serving.generate import cpu_cluster
from serving.interface import Demand, ServedModel
from serving.scheduler import StepScheduler
from serving.sim.backend import SimulatedBackend
from serving.spec import load_spec
from workloads.trace import TraceRequest

pytestmark = pytest.mark.cpu


GROUP = {"placement": "given", "groups": {"m": {"devices": [0, 1], "tp": 2}}}
SYSTEMS = {  # and options
    "static": {},
    "static in a group": GROUP,
    "swap": {},
    "elastic": {},
    "elastic in a group": {"groups": GROUP["groups"]},
    "elastic-placement": {"idle_evict_s": 0},
}


def gaps_ns(
    system_name: str,
    checkpoints,
    spread: tuple[float, ...],
    count: int = 1,
    beside: float = 1.0,
    models: tuple[str, ...] = ("m",),
) -> list[list[int]]:
    """Nanoseconds between the tokens of each of `count` requests that come at once, to each of `models` in turn, which are alike.
    Stages take `beside` times as long beside a stream."""

    class Stages(StageCosts):
        def beside_stream(self, operator: str) -> float:
            return beside

    Stages.spread = spread
    directory = checkpoints["mixtral"]
    served = [ServedModel(load_spec(directory, name), directory, "bfloat16") for name in models]
    cost = CostModel(load_hardware("h200"))
    backend = SimulatedBackend("made", lambda model, device: Stages(model.spec, cost))
    options = {"page_bytes": 4096, **SYSTEMS.get(system_name, {})}
    system = registry.create(system_name.split()[0], options)
    system.start(system.plan(cpu_cluster(2, 64 << 20), served, Demand()), backend)
    trace = [TraceRequest(number, models[number % len(models)], 0.0, 5, 40, (1,) * 5) for number in range(count)]
    try:
        rows = Replay(system, trace, 10.0, 0.0005, backend.clock).run(count, "sim").requests
    finally:
        system.stop()
    times = [row.token_times_ns for row in rows]
    return [[after - before for before, after in itertools.pairwise(one)] for one in times]


@pytest.mark.parametrize("system", SYSTEMS)
def test_a_step_takes_its_usual_time_times_one_of_the_factors(system, tiny_checkpoints):
    (usual,), (spread,) = (gaps_ns(system, tiny_checkpoints, factors) for factors in ((), (0.5, 1.5)))
    factors = [mine / other for mine, other in zip(spread, usual, strict=True)]
    assert {round(factor, 2) for factor in factors} == {0.5, 1.5}


def test_both_sides_of_a_pipeline_differ_and_runs_repeat_bit_for_bit(tiny_checkpoints):
    usual, spread, again = (
        gaps_ns("crosspool", tiny_checkpoints, factors, 3) for factors in ((), (0.5, 1.5), (0.5, 1.5))
    )
    assert spread == again != usual
    (lone,) = gaps_ns("crosspool", tiny_checkpoints, (0.5, 1.5))
    assert len({round(gap / min(lone), 1) for gap in lone}) >= 3  # each side by a factor of its own


def test_swapping_devices_slow_each_other_over_the_memory_of_their_host(tiny_checkpoints):
    """Two requests of one model on two devices, or one after the other in one lane of the same."""
    alone, beside = (sum(map(sum, gaps_ns("swap", tiny_checkpoints, (), 2, beside=slowed))) for slowed in (1.0, 1.5))
    (lone,), (lone_beside,) = (gaps_ns("swap", tiny_checkpoints, (), 1, beside=slowed) for slowed in (1.0, 1.5))
    assert lone == lone_beside and alone < beside < 1.5 * alone


@pytest.mark.parametrize("system", ["elastic", "elastic-placement"])
def test_engines_slow_each_other_over_the_memory_of_their_host(tiny_checkpoints, system):
    """One on each core, or one alone."""
    lone, lone_beside = (gaps_ns(system, tiny_checkpoints, (), 1, slowed, ("m", "n")) for slowed in (1.0, 1.5))
    alone, beside = (
        sum(map(sum, gaps_ns(system, tiny_checkpoints, (), 2, slowed, ("m", "n")))) for slowed in (1.0, 1.5)
    )
    assert lone == lone_beside and alone == 2 * sum(lone[0])
    assert alone < beside < 1.5 * alone


@pytest.mark.parametrize("system", ["swap", "elastic", "elastic-placement", "static in a group"])
def test_steps_that_repeat_differ_as_those_that_are_begun_one_by_one(system, tiny_checkpoints, monkeypatch):
    models = ("m",) if "group" in system else ("m", "n", "o")
    found = gaps_ns(system, tiny_checkpoints, (0.5, 1.0, 1.5), 6, 1.5, models)
    monkeypatch.setattr(StepScheduler, "repeats", lambda self, plan: 0)
    decide = RequestLevel.decide
    monkeypatch.setattr(RequestLevel, "decide", lambda policy, view: replace(decide(policy, view), settled=False))
    assert found == gaps_ns(system, tiny_checkpoints, (0.5, 1.0, 1.5), 6, 1.5, models)
