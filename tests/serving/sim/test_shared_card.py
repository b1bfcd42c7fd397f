"""A card that both pools of CrossPool share: its memory is divided as for the real cards, and what runs there at once slows each other."""

from pathlib import Path

import pytest

from serving import registry
from serving.cost.table1 import published_spec
from serving.gpu_suite.serve import replay
from serving.interface import Cluster, Demand, Device, Request, ServedModel
from serving.sim.backend import simulate_card

pytestmark = pytest.mark.cpu

MODELS = [
    ServedModel(published_spec(name), Path("unused"), "bfloat16") for name in ("qwen3-30b-a3b", "deepseek-v2-lite")
]
OPTIONS = {"page_bytes": 2 << 20, "ffn_sharding": "layer", "max_batch": 3}
GIB = 1 << 30


def cards(*budgets_gib):
    return Cluster(tuple(Device(f"gpu:{i}", "cuda", i, gib * GIB, card="h200") for i, gib in enumerate(budgets_gib)))


def token_times(cluster, arrivals, **options):
    """Planned devices, and when each request got its tokens."""
    backend, system = simulate_card("h200"), registry.create("crosspool", {**OPTIONS, **options})
    placement = system.plan(cluster, MODELS, Demand())
    system.start(placement, backend)
    try:
        return placement.devices, replay(system, arrivals, 60.0, backend.clock)
    finally:
        system.stop()


def request(number, model):
    return 0.0, Request(number, MODELS[model].name, (7,) * 40, 20)


def test_one_batch_has_the_card_to_itself():
    """A card with both pools, and the same pools on cards of their own: what never overlaps takes the same time."""
    shared, times = token_times(cards(120, 50), [request(0, 0)], kv_share=0.25)
    apart, apart_times = token_times(cards(30, 50, 90), [request(0, 0)])
    assert [plan.device.memory_bytes for plan in shared] == [30 * GIB, 50 * GIB, 90 * GIB]
    assert [plan.kv_bytes for plan in shared] == [plan.kv_bytes for plan in apart]
    assert [plan.weights_bytes for plan in shared] == [plan.weights_bytes for plan in apart]
    assert times == apart_times


@pytest.mark.parametrize("budgets", [(120,), (120, 50)], ids=["one card", "two cards"])
def test_two_batches_slow_each_other_on_the_card_that_they_share(budgets):
    arrivals = [request(0, 0), request(1, 1)]
    _, times = token_times(cards(*budgets), arrivals, kv_share=0.25)
    _, apart = token_times(cards(30, *budgets[1:], 90), arrivals)
    ended, ended_apart = (max(at for each in found.values() for at in each) for found in (times, apart))
    assert ended > 1.01 * ended_apart
    assert token_times(cards(*budgets), arrivals, kv_share=0.25)[1] == times
