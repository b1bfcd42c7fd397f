"""A card that both pools of CrossPool share: its memory is divided as for the real cards, and what runs there at once slows each other."""

import dataclasses
from pathlib import Path

import pytest

from serving import registry
from serving.cost.contention import Contention, slowdowns
from serving.cost.hardware import load_hardware
from serving.cost.operators import CostModel
from serving.cost.stages import StageCosts
from serving.cost.table1 import published_spec
from serving.gpu_suite.serve import replay
from serving.interface import Cluster, Demand, Device, Request, ServedModel
from serving.parallel.costs import GroupCosts, StepShape
from serving.parallel.group import GroupPlan
from serving.sim.backend import simulate_card

pytestmark = pytest.mark.cpu

MODELS = [
    ServedModel(published_spec(name), Path("unused"), "bfloat16") for name in ("qwen3-30b-a3b", "deepseek-v2-lite")
]
TWINS = [
    dataclasses.replace(MODELS[1], spec=dataclasses.replace(MODELS[1].spec, name=name)) for name in ("castor", "pollux")
]
OPTIONS = {"page_bytes": 2 << 20, "ffn_sharding": "layer", "max_batch": 3}
GIB = 1 << 30
PROMPT, NEW = 40, 20


def cards(*budgets_gib):
    return Cluster(tuple(Device(f"gpu:{i}", "cuda", i, gib * GIB, card="h200") for i, gib in enumerate(budgets_gib)))


def token_times(cluster, arrivals, models=MODELS, **options):
    """Planned devices, and when each request got its tokens."""
    backend, system = simulate_card("h200"), registry.create("crosspool", {**OPTIONS, **options})
    placement = system.plan(cluster, models, Demand())
    system.start(placement, backend)
    try:
        return placement.devices, replay(system, arrivals, 60.0, backend.clock)
    finally:
        system.stop()


def request(number, model, models=MODELS):
    return 0.0, Request(number, models[model].name, (7,) * PROMPT, NEW)


@pytest.mark.parametrize("whole", [True, False], ids=["one card", "two cards"])
def test_one_batch_has_the_card_to_itself(whole):
    """A card with both pools, and the same pools on cards of their own: what never overlaps takes the same time."""
    others = [] if whole else [50]
    shared, times = token_times(cards(120, *others), [request(0, 0)], kv_share=0.25)
    apart, apart_times = token_times(cards(30, *others, 90), [request(0, 0)])
    assert [plan.device.memory_bytes for plan in shared] == [gib * GIB for gib in (30, *others, 90)]
    assert [plan.kv_bytes for plan in shared] == [plan.kv_bytes for plan in apart]
    assert [plan.weights_bytes for plan in shared] == [plan.weights_bytes for plan in apart]
    assert times[0] == pytest.approx(apart_times[0], abs=1e-6)  # sums of other roundings


def test_two_batches_slow_each_other_on_a_card_that_holds_a_part_of_the_ffns():
    arrivals = [request(0, 0), request(1, 1)]
    _, times = token_times(cards(120, 50), arrivals, kv_share=0.25)
    _, apart = token_times(cards(30, 50, 90), arrivals)
    ended, ended_apart = (max(at for each in found.values() for at in each) for found in (times, apart))
    assert ended > 1.01 * ended_apart
    assert token_times(cards(120, 50), arrivals, kv_share=0.25)[1] == times


def test_neither_side_of_a_card_serves_one_lane_after_the_other():
    """Steps that are alike in both lanes take about as much longer than alone as the contention rule has it for whole steps."""
    both = [request(number, number, TWINS) for number in range(2)]
    _, alone = token_times(cards(120), both[:1], TWINS, kv_share=0.25)
    _, together = token_times(cards(120), both, TWINS, kv_share=0.25)
    assert together[0] == pytest.approx(together[1])
    hardware = load_hardware("h200")
    costs = GroupCosts(StageCosts(TWINS[0].spec, CostModel(hardware, "bfloat16")), GroupPlan(("card",)))
    load = costs.step_load([StepShape(1, PROMPT + NEW)])
    alone_s = alone[0][-1] - alone[0][-2]
    expected = slowdowns([dataclasses.replace(load, alone_s=alone_s)] * 2, hardware, Contention())[0]
    assert together[0][-1] - together[0][-2] == pytest.approx(expected * alone_s, rel=0.05)
    assert 1.05 < expected < 1.9
