"""Simulated clusters: the paper's models fit its server, cards and caps are each device's, nodes are far, bad input is named."""

from pathlib import Path

import pytest

from runner.config import bench_from_dict
from serving import registry
from serving.cost.table1 import published_spec
from serving.errors import CapacityError, UserError
from serving.interface import Cluster, Demand, Device, Request, ServedModel
from serving.sim.backend import simulate_card
from workloads.compose import _preset

pytestmark = pytest.mark.cpu

MODELS = [
    ServedModel(published_spec(name), Path("unused"), "bfloat16")
    for name in ("qwen3-30b-a3b", "deepseek-v2-lite", "glm-4.7-flash")
]
GIB = 1 << 30


def cards(count, memory_bytes=40 * GIB, card="a100-40gb", per_node=8):
    return Cluster(
        tuple(Device(f"gpu:{i}", "cuda", i, memory_bytes, node=i // per_node, card=card) for i in range(count))
    )


def crosspool(**options):
    return registry.create("crosspool", {"page_bytes": 2 << 20, "ffn_sharding": "layer", **options})


def last_token_s(cluster, card="a100-40gb", **options):
    """When one short request has its last token."""
    system, backend = crosspool(**options), simulate_card(card)
    system.start(system.plan(cluster, MODELS[1:2], Demand()), backend)
    try:
        system.submit(Request(0, MODELS[1].name, (1,) * 8, 6))
        backend.clock.sleep(5)
        return max(event.time_ns for event in system.poll() if event.tokens) / 1e9
    finally:
        system.stop()


def test_the_papers_models_fit_its_server_by_width_or_layer_only():
    for sharding in ("layer", "tensor"):
        plans = crosspool(ffn_sharding=sharding).plan(cards(5), MODELS, Demand()).devices
        assert 25e9 < plans[0].kv_bytes < 40e9
        assert [sum(p.weights_bytes.values()) for p in plans[1:]] == pytest.approx([36.1e9] * 4, rel=0.03)
    with pytest.raises(CapacityError, match=r"gpu:\d: FFN weights .* bytes .* are missing"):
        crosspool(ffn_sharding="whole").plan(cards(5), MODELS, Demand())


def test_a_device_is_its_own_card():
    assert last_token_s(cards(3, card="h200")) < last_token_s(cards(3))
    with pytest.raises(CapacityError, match=r"gpu:\d: .* bytes more than a100-40gb has"):
        last_token_s(cards(3, memory_bytes=80 * GIB))
    with pytest.raises(UserError, match="unknown hardware 'a40'; known: a100-40gb"):
        last_token_s(cards(3, card="a40"))


def test_rows_that_cross_between_nodes_take_longer():
    assert last_token_s(cards(3)) < last_token_s(cards(3, per_node=1))


def test_a_group_over_nodes_is_refused():
    groups = {MODELS[1].name: {"devices": [0, 1]}}
    system = registry.create("static", {"page_bytes": 2 << 20, "placement": "given", "groups": groups})
    placement = system.plan(cards(2, per_node=1), MODELS[1:2], Demand())
    with pytest.raises(UserError, match="spans nodes"):
        system.start(placement, simulate_card("a100-40gb"))


def test_the_largest_cluster_has_64_devices_in_8_nodes():
    config = bench_from_dict(_preset("paper-tbt", ["cluster=h200x64"]))
    assert len(config.devices) == 64 and {device.node for device in config.devices} == set(range(8))
